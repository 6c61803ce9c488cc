"""From noise to latents: Euler steps under guidance, in one jitted program, with attention read on the way.

A step is made of up to three predictions, which are rows of one batch: under the prompt, under the negative prompt, and
under the prompt in a perturbed model.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from seg4diff_jax.flow import FlowSchedule, euler, guided
from seg4diff_jax.models.attention import ForwardOptions, JointQKV, Reader, Stream
from seg4diff_jax.models.conditioning import TextConditioning
from seg4diff_jax.models.kernels import Kernel
from seg4diff_jax.models.perturbation import Change, Perturbation, Perturbing
from seg4diff_jax.models.sd3.model import MMDiT
from seg4diff_jax.models.trunk import keep_if, room_for


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Perturbed:
    """A pytree of what is perturbed in a generating run. One program serves every choice of blocks, steps and scale.

    Attributes:
      blocks: which blocks, for each picture.
      steps: which steps, from the start of the run; None: all.
      scale: how far the run is guided away from the perturbed prediction, as in SEG: a further forward pass in the
        perturbed steps. None: the run itself is perturbed.
      change: the blur, or `skip`. Static.
      halves: whether the prompts' half is perturbed, and the negative prompt's, of a run that is perturbed itself.
        Static.
    """

    blocks: Bool[Array, "pictures blocks"] | Any  # JAX rebuilds pytrees with stand-ins for arrays
    steps: Bool[Array, " steps"] | Any | None
    scale: Float[Array, ""] | Any | None
    change: Change = field(metadata={"static": True})
    halves: tuple[bool, bool] = field(default=(True, True), metadata={"static": True})


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class GeneratingRun:
    """A pytree of what a generating run starts from: a row for each picture, all sizes and options checked.

    Attributes:
      latents: what the first step sees: noise, or an image at the first noise level.
      texts: conditioning of each picture.
      sigmas: falling noise levels, without the clean end (`FlowSchedule.sigmas`).
      guidance: the negative prompt's conditioning (a row for each picture, or one for all) and the guidance scale.
        Scale 1 follows `texts` alone. None: no guidance, and one forward pass per picture and step instead of two.
      perturbed: None: nothing is.
    """

    latents: Float[Array, "pictures rows columns channels"] | Any
    texts: TextConditioning | Any
    sigmas: Float[Array, " steps"] | Any
    guidance: tuple[TextConditioning, Float[Array, ""]] | Any | None = None
    perturbed: Perturbed | Any | None = None

    def with_perturbation(self, asked: Perturbation, depth: int, scale: float | None = None) -> GeneratingRun:
        """Perturbs all pictures of this run of a model of `depth` blocks; with a scale, guides away from it.

        Raises ValueError if the run, or the model, has not what is to be perturbed.
        """
        blocks, steps = asked.of_blocks(depth), asked.of_steps(len(self.sigmas))
        if asked.half != "both" and (self.guidance is None or scale is not None):
            raise ValueError(f"half is {asked.half!r}, and it is of a run with guidance that is perturbed itself")
        if asked.is_nothing:
            return self
        of_pictures = jnp.broadcast_to(jnp.asarray(blocks), (len(self.latents), depth))
        return replace(
            self,
            perturbed=Perturbed(
                of_pictures,
                None if steps is None else jnp.asarray(steps),
                None if scale is None else jnp.float32(scale),
                asked.change,
                (asked.half != "negative", asked.half != "prompt"),
            ),
        )


def check_whole(transformer: MMDiT) -> None:
    """Raises ValueError unless all blocks of the transformer are loaded."""
    loaded, last = transformer.depth - 1, transformer.config.num_layers - 1
    if loaded < last:
        raise ValueError(f"blocks 0..{loaded} of 0..{last} are loaded; pictures need all: load without blocks=")


@partial(jax.jit, static_argnames=("kernel",))
def sample_latents(
    transformer: MMDiT, run: GeneratingRun, *, kernel: Kernel | None = None
) -> Float[Array, "pictures rows columns channels"]:
    """Samples clean latents with Euler steps. Latents are fp32 between the steps.

    All steps are one scan in one program, so compile time does not grow with the number of steps.

    Raises:
      ValueError: the transformer lacks its last blocks, or the latents do not fit it.
    """
    return _sample(transformer, run, Looking((), ()), ForwardOptions(None, kernel))[0]


class Looking(NamedTuple):
    """Which blocks are looked at in a generating run, and in which of its steps, counted from 0 at its start."""

    blocks: tuple[int, ...]
    steps: tuple[int, ...]


@partial(jax.jit, static_argnames=("looking", "kernel"))
def sample_looking(
    transformer: MMDiT, run: GeneratingRun, reader: Reader, *, looking: Looking, kernel: Kernel | None = None
) -> tuple[Float[Array, "pictures rows columns channels"], dict[int, Any]]:
    """Does as `sample_latents`, and returns also what a reader keeps of blocks in some steps, of the prompts' rows.

    The records of each block are stacked along a leading axis of the steps, in the order of `looking.steps`. In other
    steps, and in other blocks, nothing is read.

    Raises:
      ValueError: as `sample_latents`; or the run has no such step, the model no such block, or none is named.
    """
    steps = len(run.sigmas)
    if not looking.steps or not looking.blocks:
        raise ValueError(f"{looking}: expected at least one block and one step")
    if len(set(looking.steps)) < len(looking.steps):
        raise ValueError(f"{looking}: expected each step once")
    if beyond := [step for step in looking.steps if not 0 <= step < steps]:
        raise ValueError(f"step {beyond[0]} is not of this run: its {steps} steps are 0..{steps - 1}")
    return _sample(transformer, run, looking, ForwardOptions(reader, kernel).about(run.texts))


def _sample(
    transformer: MMDiT, run: GeneratingRun, looking: Looking, options: ForwardOptions
) -> tuple[Float[Array, "pictures rows columns channels"], dict[int, Any]]:
    steps, perturbed = len(run.sigmas), run.perturbed
    looked_at = jnp.zeros(steps, bool).at[jnp.array(looking.steps, int)].set(True)
    places = jnp.zeros(steps, int).at[jnp.array(looking.steps, int)].set(jnp.arange(len(looking.steps)))
    is_perturbed = jnp.ones(steps, bool) if perturbed is None or perturbed.steps is None else perturbed.steps
    predict = _prediction(transformer, run, looking.blocks, options)
    plainly = _prediction(transformer, replace(run, perturbed=None), looking.blocks, options)

    def predicted(latents: Array, sigma: Array, step: Array, kept: Any) -> tuple[Array, Any]:
        inputs = latents, sigma, looked_at[step], is_perturbed[step]
        if perturbed is None or perturbed.scale is None or perturbed.steps is None:
            velocity, records = predict(*inputs)
        else:  # the further row, in those steps alone that have it
            velocity, records = jax.lax.cond(is_perturbed[step], predict, plainly, *inputs)
        kept = keep_if(looked_at[step], kept, places[step], lambda: records) if looking.blocks else kept
        return velocity, kept

    one = jax.eval_shape(predict, run.latents, run.sigmas[0], looked_at[0], is_perturbed[0])[1]
    return euler(predicted, run.latents, run.sigmas, room_for(len(looking.steps), one))


def _prediction(
    transformer: MMDiT, run: GeneratingRun, blocks: tuple[int, ...], options: ForwardOptions
) -> Callable[[Array, Array, Array, Array], tuple[Array, dict[int, Any]]]:
    """Returns what a step computes: the velocity under all guidance, and the records of `blocks`.

    It is a function of latents, noise level, whether records are wanted, and whether the step is perturbed.
    """
    texts, perturbed = [run.texts], run.perturbed
    if run.guidance is not None:
        texts.append(run.guidance[0])
    branches = [] if perturbed is None else [*perturbed.halves[: len(texts)]]
    if perturbed is not None and perturbed.scale is not None:
        branches = [*[False] * len(texts), True]
        texts.append(run.texts)
    conditioning = jax.tree.map(_interleaved, *texts) if len(texts) > 1 else run.texts
    patch = transformer.config.patch_size
    grid = run.latents.shape[1] // patch, run.latents.shape[2] // patch

    def predict(
        latents: Float[Array, "pictures rows columns channels"],
        sigma: Float[Array, ""],
        wanted: Bool[Array, ""],
        is_perturbed: Bool[Array, ""],
    ) -> tuple[Float[Array, "pictures rows columns channels"], dict[int, Any]]:
        seen = _interleaved(*[latents] * len(texts)) if len(texts) > 1 else latents
        timesteps = jnp.full(len(seen), FlowSchedule.num_train_timesteps * sigma, jnp.float32)
        own = replace(options, request=options.request and _ReadIf(options.request, wanted, len(texts)))
        if perturbed is not None:
            each = perturbed.blocks[:, None] & jnp.array(branches)[:, None] & is_perturbed
            rows = each.reshape(-1, transformer.depth).T
            own = replace(own, perturbing=Perturbing(perturbed.change, rows, grid))
        velocity, records = transformer(seen, timesteps, conditioning, capture=blocks, options=own)
        each = velocity.astype(jnp.float32).reshape(len(latents), len(texts), *velocity.shape[1:])
        result = towards = each[:, 0]
        if run.guidance is not None:
            result = guided(towards, each[:, 1], run.guidance[1])
        if perturbed is not None and perturbed.scale is not None:
            result = result + perturbed.scale * (towards - each[:, -1])
        return result, records

    return predict


def _interleaved(first: Float[Array, "rows ..."], *others: Float[Array, "_ ..."]) -> Float[Array, "all ..."]:
    """Interleaves the rows of arrays, so that all rows of a picture lie on one device.

    Each of the others may have one row, which then serves all.
    """
    every = [first, *(jnp.broadcast_to(other, first.shape) for other in others)]
    return jnp.stack(every, axis=1).reshape(-1, *first.shape[1:])


@dataclass(frozen=True)
class _ReadIf:
    """A reader that reads every `stride`-th row of the batch if that is wanted, and otherwise returns zeros."""

    reader: Reader
    wanted: Bool[Array, ""] | Any
    stride: int

    @property
    def normalized_queries(self) -> tuple[Stream, ...]:
        return self.reader.normalized_queries

    def about(self, conditioning: TextConditioning) -> Reader:
        return self  # its reader has been told

    def read(self, joint: JointQKV) -> Any:
        read = lambda joint: self.reader.read(jax.tree.map(lambda x: x[:: self.stride], joint))
        nothing = lambda joint: jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), jax.eval_shape(read, joint))
        return jax.lax.cond(self.wanted, read, nothing, joint)
