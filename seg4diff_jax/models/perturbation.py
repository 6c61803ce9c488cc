"""Perturbed passes: image-to-text attention is blurred in some blocks, or the blocks are skipped (Seg4Diff, 3.3, A.3).

The blur along the text acts on the probabilities P after the softmax. It is linear in the keys: with M[i, j] what key i
gives to key j, the perturbed output is (P M) V = P (M V). Image queries therefore attend to blurred values, and text
queries to the values as they are: two calls of any kernel, and no map.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, Literal, get_args

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from seg4diff_jax.checked import Checked
from seg4diff_jax.models.conditioning import TextConditioning
from seg4diff_jax.models.kernels import Kernel, attend, attention_scores, repeat_last

Pad = Literal["symmetric", "reflect"]
Half = Literal["both", "prompt", "negative"]
PAPER_KERNEL = 5
WIDEST = 1000
"""Largest sigma of a blur over the image whose taps follow from it: every grid of tokens is smaller."""


def _is_whole(value: Any) -> bool:
    return isinstance(value, int | np.integer) and not isinstance(value, bool)


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float | np.number) and not isinstance(value, bool)


@jax.tree_util.register_static
@dataclass(frozen=True)
class Blur(Checked):
    """A Gaussian blur of image-to-text probabilities, after the softmax. Static under jit.

    Attributes:
      sigma: standard deviation, in tokens. 0: no blur.
      kernel: number of taps, odd. Default: 5 along the text, as in the paper; over the image ceil(6 sigma), made odd,
        as in SEG (smoothed energy guidance).
      pad: what lies beyond the ends. `symmetric` repeats the edge and keeps each row's mass. `reflect` is PyTorch's,
        which does not: the first and the last token count less, their neighbours more.
      over: the `text` tokens of each image token, as in the paper; or the `image`'s plane, for each text token. The
        latter is ours: rows are then scaled to the mass on the text that they had.
      text_tokens: which text tokens take part, as in `AttentionRequest`: a segment's name, or first and last.
    """

    sigma: float = 9.0
    kernel: int | None = None
    pad: Pad = "symmetric"
    over: Literal["text", "image"] = "text"
    text_tokens: str | tuple[int, int | None] = "clip"

    def problems(self) -> list[str]:
        """Returns what is wrong with the options, one sentence for each problem."""
        found = []
        if not _is_number(self.sigma) or not 0 <= self.sigma < math.inf:
            found.append(f"sigma is {self.sigma!r}; expected a number of tokens, at least 0")
        elif self.over == "image" and self.kernel is None and self.sigma > WIDEST:
            found.append(f"sigma is {self.sigma!r}; expected at most {WIDEST}, or name a kernel")
        if self.kernel is not None and not (_is_whole(self.kernel) and self.kernel > 0 and self.kernel % 2):
            found.append(f"kernel is {self.kernel!r}; expected an odd number of taps")
        if not isinstance(self.text_tokens, str):
            start, stop = self.text_tokens
            if start < 0 or (stop is not None and stop <= start):
                found.append(f"text_tokens is {self.text_tokens}; expected 0 <= first < last, or None for the end")
        if self.pad not in get_args(Pad):
            found.append(f"pad is {self.pad!r}; there are {', '.join(get_args(Pad))}")
        if self.over not in ("text", "image"):
            found.append(f"over is {self.over!r}; there are text, image")
        return found

    def weights(self) -> Float[np.ndarray, " taps"]:
        """Returns the weights of the taps, which add up to 1; float64."""
        if self.sigma == 0:
            return np.ones(1)
        taps = self.kernel or (PAPER_KERNEL if self.over == "text" else math.ceil(6 * self.sigma) | 1)
        distances = np.arange(taps) - taps // 2
        weights = np.exp(-0.5 * np.square(distances / self.sigma))
        return weights / weights.sum()

    def matrix(self, length: int) -> Float[np.ndarray, "length length"]:
        """Returns M of a row of that length, float64: M[i, j] is what position i gives to position j."""
        weights = self.weights()
        reach = len(weights) // 2
        sources = np.pad(np.arange(length), reach, mode=self.pad)
        matrix = np.zeros((length, length))
        for place, weight in enumerate(weights):
            np.add.at(matrix, (sources[place : place + length], np.arange(length)), weight)
        return matrix


Change = Blur | Literal["skip"]


@dataclass(frozen=True)
class Perturbation(Checked):
    """Which blocks of a generating run are perturbed, how, and when.

    Attributes:
      blocks: numbers of the blocks.
      change: the blur, or `skip`: the tokens pass the block by, as in SD3.5's skip-layer guidance.
      steps: numbers of the steps, counted as noise levels: 1 is the last one. None: all.
      half: of a run with guidance, whether both halves of it are perturbed or only that of one prompt.
    """

    blocks: tuple[int, ...]
    change: Change = Blur()
    steps: tuple[int, ...] | None = None
    half: Half = "both"

    def __post_init__(self) -> None:
        for name in ("blocks", "steps"):
            if isinstance(given := getattr(self, name), Iterable):
                object.__setattr__(self, name, tuple(given))
            elif given is not None:
                raise ValueError(f"{name} is {given!r}; expected a list of numbers")
        super().__post_init__()

    def problems(self) -> list[str]:
        """Returns what is wrong with the options, one sentence for each problem."""
        found = []
        if not self.blocks or not all(map(_is_whole, self.blocks)) or len(set(self.blocks)) < len(self.blocks):
            found.append(f"blocks is {self.blocks}; expected the numbers of one block or more, each once")
        if not (self.change == "skip" or isinstance(self.change, Blur)):
            found.append(f"change is {self.change!r}; expected a Blur or 'skip'")
        steps = () if self.steps is None else self.steps
        if self.steps == () or not all(map(_is_whole, steps)) or len(set(steps)) < len(steps):
            found.append(f"steps is {self.steps}; expected the numbers of one step or more, each once, or None for all")
        if self.half not in get_args(Half):
            found.append(f"half is {self.half!r}; there are {', '.join(get_args(Half))}")
        return found

    def of_blocks(self, depth: int) -> Bool[np.ndarray, " depth"]:
        """Which of the blocks of a model are perturbed. Raises ValueError if it holds not all of them."""
        if beyond := [block for block in self.blocks if not 0 <= block < depth]:
            raise ValueError(f"cannot perturb block {beyond[0]}: the model holds blocks 0..{depth - 1}")
        return np.isin(np.arange(depth), self.blocks)

    def of_steps(self, steps: int) -> Bool[np.ndarray, " steps"] | None:
        """Which steps of a run are perturbed, from its start; None: all. Raises ValueError for one that it has not."""
        if beyond := [step for step in self.steps or () if not 1 <= step <= steps]:
            raise ValueError(f"cannot perturb step {beyond[0]}: this run has steps {steps} (the first) to 1 (the last)")
        return None if self.steps is None else np.isin(np.arange(steps, 0, -1), self.steps)

    @property
    def is_nothing(self) -> bool:
        """Whether it changes no probability: a blur of sigma 0."""
        return isinstance(self.change, Blur) and len(self.change.weights()) == 1


def skip_layers(
    steps: int, blocks: tuple[int, ...] = (7, 8, 9), *, start: float = 0.01, stop: float = 0.2
) -> Perturbation:
    """Returns SD3.5-medium's skip-layer guidance: blocks to skip in the early steps of a run of so many.

    Defaults are those published with SD3.5-medium, for a scale of 2.8. As in diffusers, the steps are those whose
    number from the start lies strictly between `start` and `stop` x `steps`.

    Raises ValueError if there is no such step.
    """
    chosen = tuple(steps - number for number in range(steps) if steps * start < number < steps * stop)
    if not chosen:
        raise ValueError(f"none of {steps} steps lies between {start:g} and {stop:g} of the run")
    return Perturbation(tuple(blocks), "skip", chosen)


@dataclass(frozen=True)
class Perturbing:
    """A perturbation at work in a pass; for use inside jit. One program serves every choice of blocks and rows.

    Attributes:
      rows: for each block of the model, which rows of the batch are perturbed there.
      grid: rows and columns of image tokens.
    """

    change: Change
    rows: Bool[Array, "blocks batch"] | Any
    grid: tuple[int, int]

    def about(self, conditioning: TextConditioning) -> Perturbing:
        """With a segment's name as the numbers of its tokens. Raises ValueError when the text has none such."""
        if not isinstance(self.change, Blur) or not isinstance(self.change.text_tokens, str):
            return self
        return replace(self, change=replace(self.change, text_tokens=conditioning.tokens(self.change.text_tokens)))

    def in_block(self, number: Int[Array, ""] | int) -> PerturbingBlock:
        """Of one block."""
        return PerturbingBlock(self.change, self.rows[number], self.grid)


@dataclass(frozen=True)
class PerturbingBlock:
    """A perturbation at work in one block, in some rows of the batch; for use inside jit."""

    change: Change
    rows: Bool[Array, " batch"] | Any
    grid: tuple[int, int]

    def passed_by(self, before: Any, after: Any) -> Any:
        """Returns the state after a block: in rows that skip it, the state before it."""
        if self.change != "skip":
            return after
        kept = lambda x, y: jnp.where(self.rows.reshape(-1, *(1,) * (x.ndim - 1)), x, y)
        return jax.tree.map(kept, before, after)


def perturbed_attend(
    q: Float[Array, "batch queries heads head_dim"],
    k: Float[Array, "batch keys heads head_dim"],
    v: Float[Array, "batch keys heads head_dim"],
    *,
    perturbing: PerturbingBlock,
    kernel: Kernel | None = None,
    normalizer: bool = False,
    last_key_count: int = 1,
) -> tuple[Float[Array, "batch queries heads head_dim"], Float[Array, "batch heads queries"] | None]:
    """Does as `kernels.attend`, with the image queries' probabilities of text tokens blurred in some rows.

    Log-normalisers are those of the softmax, which the blur does not change.

    Args:
      q, k, v: of the joint sequence, image first.
      perturbing: the blur, with its text tokens by their numbers.
      kernel, normalizer, last_key_count: as for `kernels.attend`.
    """
    blur, cut = perturbing.change, math.prod(perturbing.grid)
    assert isinstance(blur, Blur)
    columns = _columns(blur, cut, k.shape[1] - 1 + last_key_count)
    rows = perturbing.rows[:, None, None, None]
    if blur.over == "image":
        output, totals = attend(q, k, v, kernel=kernel, normalizer=True, last_key_count=last_key_count)
        assert totals is not None
        every_k, every_v = (repeat_last(x, last_key_count, axis=1)[:, columns] for x in (k, v))
        change = lambda: _change_of_output(q[:, :cut], totals[:, :, :cut], every_k, every_v, perturbing)
        none = lambda: jnp.zeros((*q[:, :cut].shape[:-1], v.shape[-1]), jnp.float32)
        changed = jnp.where(rows, jax.lax.cond(perturbing.rows.any(), change, none), 0)
        return output.at[:, :cut].set((output[:, :cut] + changed).astype(output.dtype)), totals

    attended = partial(attend, kernel=kernel, normalizer=normalizer)
    of_text = attended(q[:, cut:], k, v, last_key_count=last_key_count)
    if columns.stop > k.shape[1] - (last_key_count > 1):  # tokens that were equal no longer have equal values
        k, v, last_key_count = repeat_last(k, last_key_count, axis=1), repeat_last(v, last_key_count, axis=1), 1
    blurred = _along(v[:, columns], blur.matrix(columns.stop - columns.start), axis=1).astype(v.dtype)
    blurred = v.at[:, columns].set(jnp.where(rows, blurred, v[:, columns]))
    of_image = attended(q[:, :cut], k, blurred, last_key_count=last_key_count)
    output, totals = jnp.concatenate([of_image[0], of_text[0]], axis=1), None
    if of_image[1] is not None and of_text[1] is not None:
        totals = jnp.concatenate([of_image[1], of_text[1]], axis=2)
    return output, totals


def _columns(blur: Blur, image_tokens: int, tokens: int) -> slice:
    """Returns which of the joint sequence's tokens take part in a blur. Raises ValueError if the text ends before."""
    assert not isinstance(blur.text_tokens, str), "a segment's name has been looked up"
    start, stop = blur.text_tokens
    stop = tokens if stop is None else min(image_tokens + stop, tokens)
    if image_tokens + start >= stop:
        raise ValueError(f"text_tokens is {blur.text_tokens}; this text has {tokens - image_tokens} tokens")
    return slice(image_tokens + start, stop)


def _along(x: Float[Array, "*shape"], matrix: Float[np.ndarray, "length length"], axis: int) -> Float[Array, "*shape"]:
    """Multiplies an axis by a matrix, in fp32: result[i] is the sum over j of matrix[i, j] x[j]."""
    product = jnp.tensordot(
        jnp.asarray(matrix, jnp.float32), x.astype(jnp.float32), (1, axis), precision=jax.lax.Precision.HIGHEST
    )
    return jnp.moveaxis(product, 0, axis)


def _change_of_output(
    q: Float[Array, "batch image heads head_dim"],
    normalizer: Float[Array, "batch heads image"],
    k: Float[Array, "batch columns heads head_dim"],
    v: Float[Array, "batch columns heads head_dim"],
    perturbing: PerturbingBlock,
) -> Float[Array, "batch image heads head_dim"]:
    """Returns what a blur over the image plane adds to the image's output, fp32: one head's maps at a time."""
    blur = perturbing.change
    assert isinstance(blur, Blur)
    rows, columns = perturbing.grid

    def of_head(head: tuple[Array, Array, Array, Array]) -> Float[Array, "batch image head_dim"]:
        q, normalizer, k, v = head
        probs = jnp.exp(attention_scores(q[:, :, None], k[:, :, None])[:, 0] - normalizer[..., None])
        plane = probs.reshape(len(probs), rows, columns, -1)
        plane = _along(_along(plane, blur.matrix(rows).T, axis=1), blur.matrix(columns).T, axis=2)
        blurred = plane.reshape(probs.shape)
        mass, found = probs.sum(axis=-1, keepdims=True), blurred.sum(axis=-1, keepdims=True)
        change = blurred * (mass / jnp.maximum(found, jnp.finfo(jnp.float32).tiny)) - probs
        return jnp.matmul(change, v.astype(jnp.float32), precision=jax.lax.Precision.HIGHEST)

    heads_first = (jnp.moveaxis(q, 2, 0), jnp.moveaxis(normalizer, 1, 0), jnp.moveaxis(k, 2, 0), jnp.moveaxis(v, 2, 0))
    return jnp.moveaxis(jax.lax.map(of_head, heads_first), 0, 2)
