"""Rectified flow: the noise schedule, noising, and the velocity that the model learns.

Latents at noise level sigma are (1 - sigma) z + sigma eps; the velocity is eps - z; the model is told 1000 x sigma.
The schedule is diffusers' FlowMatchEulerDiscreteScheduler with SD3's shift.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal, get_args

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int, PRNGKeyArray

from seg4diff_jax.numerics import settled

EULER = "FlowMatchEulerDiscreteScheduler"
SHIFT_KEYS = {
    EULER: "shift",
    "FlowMatchHeunDiscreteScheduler": "shift",
    "FlowMatchLCMScheduler": "shift",
    "UniPCMultistepScheduler": "flow_shift",
    "DPMSolverMultistepScheduler": "flow_shift",
    "DPMSolverSinglestepScheduler": "flow_shift",
    "DEISMultistepScheduler": "flow_shift",
    "SASolverScheduler": "flow_shift",
}
"""diffusers' samplers of rectified flows, and what each calls the shift. Those with `flow_shift` are made for other
models too: they follow a flow where `use_flow_sigmas` is set and `prediction_type` is `flow_prediction`."""
OTHER_MODELS = ("use_dynamic_shifting", "invert_sigmas")
"""Options of models whose noise levels have no fixed shift, or run the other way."""
OTHER_STEPS = (
    "use_karras_sigmas",
    "use_exponential_sigmas",
    "use_beta_sigmas",
    "shift_terminal",
    "stochastic_sampling",
)
"""Options that make other pictures of the same model: its steps lie elsewhere, or add noise."""

Sampler = Literal["euler"]


@dataclass(frozen=True)
class FlowSchedule:
    """Noise levels, from noise to clean.

    They are the model's own and what masks are read at, whichever sampler a checkpoint names for its pictures.

    Attributes:
      shift: how far levels are pushed towards noise: sigma -> shift sigma / (1 + (shift - 1) sigma).
      sampler: what the checkpoint makes pictures with: diffusers' class, and options of it that change them.
      num_train_timesteps: the timestep of pure noise, the same for every SD3.
    """

    shift: float = 3.0
    sampler: str = EULER
    num_train_timesteps: ClassVar[int] = 1000

    @classmethod
    def from_json(cls, config: dict[str, Any]) -> FlowSchedule:
        """From a diffusers `scheduler_config.json`. Raises ValueError for a schedule that is not SD3's kind."""
        name = config.get("_class_name", EULER)
        if not isinstance(name, str) or name not in SHIFT_KEYS:
            raise ValueError(
                f"the scheduler is {name!r:.80}, which is not known to follow a flow as SD3 does; expected one of "
                + ", ".join(SHIFT_KEYS)
            )
        key = SHIFT_KEYS[name]
        if key == "flow_shift":
            for option, expected in (("use_flow_sigmas", True), ("prediction_type", "flow_prediction")):
                if config.get(option) != expected:
                    raise ValueError(
                        f"the scheduler is {name} whose {option} is {config.get(option)!r:.80}; SD3 is a flow: "
                        f"expected {expected!r}"
                    )
        for option in OTHER_MODELS:
            if config.get(option):
                raise ValueError(
                    f"the scheduler's {option} is {config[option]!r:.80}; SD3's schedule has a fixed shift only"
                )
        timesteps = config.get("num_train_timesteps", cls.num_train_timesteps)
        if timesteps != cls.num_train_timesteps:
            raise ValueError(
                f"the scheduler's num_train_timesteps is {timesteps!r:.80}; SD3's is {cls.num_train_timesteps}"
            )
        shift = config.get(key, 1.0)
        if type(shift) not in (int, float) or not 0 < shift < np.inf:
            raise ValueError(f"the scheduler's {key} is {shift!r:.80}; expected a positive number")
        other = "shift" if key == "flow_shift" else "flow_shift"
        if config.get(other, shift) != shift:
            # diffusers keeps the keys of the scheduler that another was made from, and takes 1 for what has a new name.
            raise ValueError(
                f"the scheduler is {name} with {key} {shift!r}, and {other} {config[other]!r:.80} is left of the one "
                f"that it was made from: set both to the model's own ({cls.shift} for SD3), or remove {other}"
            )
        changed = [f"{option} {config[option]!r:.80}" for option in OTHER_STEPS if config.get(option)]
        return cls(float(shift), " with ".join([name, *([", ".join(changed)] if changed else [])]))

    def check_sampler(self, sampler: Sampler | None) -> None:
        """Raise ValueError unless pictures by Euler steps are what the checkpoint names, or what is asked for."""
        if sampler not in (None, *get_args(Sampler)):
            raise ValueError(f"sampler is {sampler!r}; expected 'euler', or None for the checkpoint's own")
        if sampler is None and self.sampler != EULER:
            raise ValueError(
                f"the checkpoint was saved with {self.sampler} for its pictures, and only Euler steps are made here: "
                "ask for those with sampler='euler' (--sampler euler; samples.sampler in training)"
            )

    def _shifted(self, sigma: np.ndarray | float) -> np.ndarray:
        return np.asarray(self.shift * sigma / (1 + (self.shift - 1) * sigma))

    def sigmas(self, steps: int = 28) -> np.ndarray:
        """Noise levels of a run of that many steps, float64 [steps], falling from 1; the clean end (0) is left out.

        As in diffusers the shift is applied twice: to the smallest level, then to the levels spread evenly above it.
        """
        if not is_whole(steps, 1, self.num_train_timesteps):
            raise ValueError(f"steps is {steps!r}; expected a whole number, 1 to {self.num_train_timesteps}")
        smallest = self._shifted(1 / self.num_train_timesteps)
        return self._shifted(np.linspace(1.0, smallest, steps))

    def sigma_at(self, step: int = 8, steps: int = 28) -> float:
        """The noise level that the paper calls t = `step`: the `step`-th of `steps`, counted from the clean end."""
        if not is_whole(step, 1, steps):
            raise ValueError(f"step is {step!r}; expected a whole number, 1 (nearly clean) to {steps} (pure noise)")
        return float(self.sigmas(steps)[-step])


def add_noise(
    latents: Float[Array, "batch height width channels"],
    noise: Float[Array, "batch height width channels"],
    sigma: Float[Array, " batch"] | Float[Array, ""] | float,
) -> Float[Array, "batch height width channels"]:
    """Latents at noise level sigma, one for all or one for each image."""
    if jnp.ndim(sigma) == 1:
        sigma = jnp.asarray(sigma)[:, None, None, None]
    return (1 - sigma) * latents + sigma * noise


def velocity_target(
    latents: Float[Array, "batch height width channels"], noise: Float[Array, "batch height width channels"]
) -> Float[Array, "batch height width channels"]:
    """What the model should predict, at every noise level."""
    return noise - latents


def velocity_loss(
    predicted: Float[Array, "batch height width channels"], target: Float[Array, "batch height width channels"]
) -> Float[Array, " batch"]:
    """Mean squared error of each image's velocity, fp32."""
    return jnp.square(predicted.astype(jnp.float32) - target).mean(axis=(1, 2, 3))


def euler(
    velocity: Callable[
        [Float[Array, "batch height width channels"], Float[Array, ""]], Float[Array, "batch height width channels"]
    ],
    noise: Float[Array, "batch height width channels"],
    sigmas: Float[Array, " steps"],
) -> Float[Array, "batch height width channels"]:
    """Follow the velocity from noise to clean latents in straight steps, one scan; latents are fp32.

    Args:
      velocity: of latents at a noise level.
      sigmas: the levels, falling; the last step leads from the last of them to 0.
    """

    def step(latents: Array, levels: tuple[Array, Array]) -> tuple[Array, None]:
        sigma, following = levels
        return latents + (following - sigma) * velocity(latents, sigma), None

    sigmas = sigmas.astype(jnp.float32)
    latents, _ = jax.lax.scan(step, noise.astype(jnp.float32), (sigmas, jnp.append(sigmas[1:], 0.0)))
    return latents


def guided(
    towards: Float[Array, "*shape"], away: Float[Array, "*shape"], scale: Float[Array, ""] | float
) -> Float[Array, "*shape"]:
    """Classifier-free guidance: from the velocity under the negative prompt, `scale` times the way to the prompt's."""
    return away + scale * (towards - away)


def check_guidance(scale: float) -> float:
    """A finite number. Raises ValueError for anything else."""
    if isinstance(scale, bool) or not isinstance(scale, int | float | np.number) or not np.isfinite(scale):
        raise ValueError(f"guidance is {scale!r}; expected a number: 7 is usual, 1 is none")
    return float(scale)


def logit_normal_sigmas(
    key: PRNGKeyArray, count: int, *, mean: float = 0.0, std: float = 1.0, shift: float = 1.0
) -> Float[Array, " count"]:
    """Noise levels to train at: the sigmoid of normal numbers, pushed towards noise by `shift` as the schedule is.

    SD3's own are (mean, std) = (0, 1); MAGNET's (0, 0.5) over the schedule of shift 3 (Seg4Diff, section 4).
    """
    sigma = jax.nn.sigmoid(mean + std * jax.random.normal(key, (count,), jnp.float32))
    return shift * sigma / (1 + (shift - 1) * sigma)


def is_whole(value: Any, least: int, most: int | None = None) -> bool:
    """A whole number from `least` to `most`, Python's or NumPy's; True and False are none."""
    whole = isinstance(value, int | np.integer) and not isinstance(value, bool)
    return whole and bool(value >= least) and (most is None or bool(value <= most))


LARGEST_SEED = 2**32 - 1
"""JAX takes larger ones too and, without 64-bit integers, drops their upper bits: equal noise for unlike seeds."""


def check_seed(seed: int) -> int:
    """A seed that has noise of its own. Raises ValueError for any other."""
    if not is_whole(seed, 0, LARGEST_SEED):
        raise ValueError(f"seed is {seed!r}; expected a whole number, 0 to {LARGEST_SEED}")
    return int(seed)


@settled()
def image_noise(
    seed: int, indices: Int[np.ndarray, " batch"] | Sequence[int], shape: tuple[int, ...]
) -> Float[Array, "batch rows columns channels"]:
    """Standard normal noise for images by their index in the set, fp32 [batch, *shape].

    An image's noise depends on the seed and on its index alone: not on batch size, order, device or process.

    Raises ValueError for a seed outside 0..2^32 - 1.
    """
    key = jax.random.key(check_seed(seed))
    draw = lambda index: jax.random.normal(jax.random.fold_in(key, index), shape, jnp.float32)
    return jax.vmap(draw)(jnp.asarray(indices, jnp.uint32))
