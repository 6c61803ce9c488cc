"""Rectified flow: the noise schedule, noising, and the velocity that the model learns.

Latents at noise level sigma are (1 - sigma) z + sigma eps. The velocity is eps - z. The model's timestep is 1000 sigma.
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
"""Names of diffusers' samplers that can follow a rectified flow, and the name of the shift in each one's configuration.

Samplers with `flow_shift` serve other models too. They follow a flow only if `use_flow_sigmas` is set and
`prediction_type` is `flow_prediction`."""
OTHER_MODELS = ("use_dynamic_shifting", "invert_sigmas")
"""Scheduler options of other models, whose noise levels have no fixed shift or run the other way."""
OTHER_STEPS = (
    "use_karras_sigmas",
    "use_exponential_sigmas",
    "use_beta_sigmas",
    "shift_terminal",
    "stochastic_sampling",
)
"""Scheduler options that change the pictures of the same model: they move its steps, or add noise at each step."""

Sampler = Literal["euler"]


@dataclass(frozen=True)
class FlowSchedule:
    """The noise levels of a model, from noise to clean.

    Masks are read at one of these levels. The levels do not depend on the sampler that a checkpoint names for pictures.

    Attributes:
      shift: how far levels are pushed towards noise: sigma -> shift sigma / (1 + (shift - 1) sigma).
      sampler: the sampler that the checkpoint names for pictures: diffusers' class, and its options that change them.
      num_train_timesteps: the timestep of pure noise, 1000 for every SD3.
    """

    shift: float = 3.0
    sampler: str = EULER
    num_train_timesteps: ClassVar[int] = 1000

    @classmethod
    def from_json(cls, config: dict[str, Any]) -> FlowSchedule:
        """Reads a diffusers `scheduler_config.json`. Raises ValueError for a schedule that is not SD3's kind."""
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
            # diffusers can make one scheduler from another's configuration. It then keeps the old key of the shift
            # beside the new one, for which it takes 1: nobody can tell which is the model's.
            raise ValueError(
                f"the scheduler is {name} with {key} {shift!r}, and {other} {config[other]!r:.80} is left of the one "
                f"that it was made from: set both to the model's own ({cls.shift} for SD3), or remove {other}"
            )
        changed = [f"{option} {config[option]!r:.80}" for option in OTHER_STEPS if config.get(option)]
        return cls(float(shift), " with ".join([name, *([", ".join(changed)] if changed else [])]))

    def check_sampler(self, sampler: Sampler | None) -> None:
        """Raises ValueError unless the checkpoint names Euler steps for its pictures, or the caller asks for them."""
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
        """Returns the noise levels of a run with that many steps, float64 [steps], falling from 1, without the last 0.

        As in diffusers, the shift is applied twice: to the smallest level, then to levels evenly spaced from it to 1.
        """
        if not is_whole(steps, 1, self.num_train_timesteps):
            raise ValueError(f"steps is {steps!r}; expected a whole number, 1 to {self.num_train_timesteps}")
        smallest = self._shifted(1 / self.num_train_timesteps)
        return self._shifted(np.linspace(1.0, smallest, steps))

    def sigma_at(self, step: int = 8, steps: int = 28) -> float:
        """Returns the noise level that the paper calls t = `step`: number `step` of `steps`, from the clean end."""
        if not is_whole(step, 1, steps):
            raise ValueError(f"step is {step!r}; expected a whole number, 1 (nearly clean) to {steps} (pure noise)")
        return float(self.sigmas(steps)[-step])


def add_noise(
    latents: Float[Array, "batch height width channels"],
    noise: Float[Array, "batch height width channels"],
    sigma: Float[Array, " batch"] | Float[Array, ""] | float,
) -> Float[Array, "batch height width channels"]:
    """Returns latents at noise level sigma. There is one sigma for all images, or one for each."""
    if jnp.ndim(sigma) == 1:
        sigma = jnp.asarray(sigma)[:, None, None, None]
    return (1 - sigma) * latents + sigma * noise


def velocity_target(
    latents: Float[Array, "batch height width channels"], noise: Float[Array, "batch height width channels"]
) -> Float[Array, "batch height width channels"]:
    """Returns the velocity that the model should predict. It is the same at every noise level."""
    return noise - latents


def velocity_loss(
    predicted: Float[Array, "batch height width channels"], target: Float[Array, "batch height width channels"]
) -> Float[Array, " batch"]:
    """Returns the mean squared error of each image's velocity, fp32."""
    return jnp.square(predicted.astype(jnp.float32) - target).mean(axis=(1, 2, 3))


def euler(
    velocity: Callable[
        [Float[Array, "batch height width channels"], Float[Array, ""], Int[Array, ""], Any],
        tuple[Float[Array, "batch height width channels"], Any],
    ],
    noise: Float[Array, "batch height width channels"],
    sigmas: Float[Array, " steps"],
    kept: Any = None,
) -> tuple[Float[Array, "batch height width channels"], Any]:
    """Integrates the velocity from noise to clean latents with Euler steps, in one scan. Latents are fp32.

    Args:
      velocity: function of latents, their noise level, the step's number from 0, and what the step before handed on.
        It returns the velocity, and what to hand on.
      sigmas: falling noise levels; the last step goes from the last of them to 0.
      kept: what is handed to the first step.

    Returns the latents, and what the last step handed on.
    """

    def step(carry: tuple[Array, Any], levels: tuple[Array, Array, Array]) -> tuple[tuple[Array, Any], None]:
        (latents, kept), (sigma, following, number) = carry, levels
        found, kept = velocity(latents, sigma, number, kept)
        return (latents + (following - sigma) * found, kept), None

    sigmas = sigmas.astype(jnp.float32)
    levels = sigmas, jnp.append(sigmas[1:], 0.0), jnp.arange(len(sigmas))
    return jax.lax.scan(step, (noise.astype(jnp.float32), kept), levels)[0]


def guided(
    towards: Float[Array, "*shape"], away: Float[Array, "*shape"], scale: Float[Array, ""] | float
) -> Float[Array, "*shape"]:
    """Applies classifier-free guidance to the velocity under the prompt and under the negative prompt.

    The result is away + scale (towards - away): scale 1 gives `towards`, and 0 gives `away`.
    """
    return away + scale * (towards - away)


def steps_from_image(steps: int, strength: float) -> int:
    """Returns how many of the last steps a run takes that starts from an image, as in diffusers' image to image.

    Raises ValueError unless strength is a number above 0 and at most 1.
    """
    if isinstance(strength, bool) or not isinstance(strength, int | float | np.number) or not 0 < strength <= 1:
        raise ValueError(f"strength is {strength!r}; expected a number above 0 and at most 1")
    return max(1, steps - int(max(steps - min(steps * strength, steps), 0)))


def check_guidance(scale: float) -> float:
    """Returns the guidance scale as a float. Raises ValueError unless it is a finite number."""
    if isinstance(scale, bool) or not isinstance(scale, int | float | np.number) or not np.isfinite(scale):
        raise ValueError(f"guidance is {scale!r}; expected a number: 7 is usual, 1 is none")
    return float(scale)


def logit_normal_sigmas(
    key: PRNGKeyArray, count: int, *, mean: float = 0.0, std: float = 1.0, shift: float = 1.0
) -> Float[Array, " count"]:
    """Draws noise levels to train at: the sigmoid of normal numbers, then shifted as in `FlowSchedule`.

    SD3 was trained with (mean, std) = (0, 1). MAGNET takes (0, 0.5) and shift 3 (Seg4Diff, section 4).
    """
    sigma = jax.nn.sigmoid(mean + std * jax.random.normal(key, (count,), jnp.float32))
    return shift * sigma / (1 + (shift - 1) * sigma)


def is_whole(value: Any, least: int, most: int | None = None) -> bool:
    """Whether a value is a whole number from `least` to `most`, Python's or NumPy's. True and False are not."""
    whole = isinstance(value, int | np.integer) and not isinstance(value, bool)
    return whole and bool(value >= least) and (most is None or bool(value <= most))


LARGEST_SEED = 2**32 - 1
"""The largest seed. JAX accepts larger ones and, without 64-bit integers, drops their upper bits. Different seeds
would then give the same noise."""


def check_seed(seed: int) -> int:
    """Returns the seed as an int. Raises ValueError unless it is a whole number from 0 to `LARGEST_SEED`."""
    if not is_whole(seed, 0, LARGEST_SEED):
        raise ValueError(f"seed is {seed!r}; expected a whole number, 0 to {LARGEST_SEED}")
    return int(seed)


@settled()
def image_noise(
    seed: int, indices: Int[np.ndarray, " batch"] | Sequence[int], shape: tuple[int, ...], view: int = 0
) -> Float[Array, "batch rows columns channels"]:
    """Draws standard normal noise for images, by their index in the set; fp32 [batch, *shape].

    The noise of an image depends on the seed and on its index alone: not on batch size, order, device or process.

    Args:
      view: of several draws with one seed, which. The first, 0, is that of a single draw.

    Raises ValueError for a seed outside 0..2^32 - 1.
    """
    key = jax.random.key(check_seed(seed))
    of_image = lambda index: jax.random.fold_in(key, index)
    # The further draws fold once more, by a number that nothing else of an image does: 1 is of the baselines.
    of_view = of_image if not view else lambda index: jax.random.fold_in(of_image(index), 1 + view)
    draw = lambda index: jax.random.normal(of_view(index), shape, jnp.float32)
    return jax.vmap(draw)(jnp.asarray(indices, jnp.uint32))
