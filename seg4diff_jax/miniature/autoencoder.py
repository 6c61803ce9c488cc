"""The miniature's autoencoder: an AutoencoderKL trained on scenes.

Reconstruction is scored by absolute error of pixels and of their differences to neighbours (edges); a little
Kullback-Leibler divergence keeps latents near a unit normal. There is no adversary and no perceptual net. When it is
done, the latents' mean and deviation over training scenes become the shift and scaling factor.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, PRNGKeyArray

from seg4diff_jax.configuration import infinite
from seg4diff_jax.data.loader import Batch, DataSource, evaluation_batches
from seg4diff_jax.miniature.scenes import (
    SceneConfig,
    SceneItems,
    scene_name,
    training_scenes,
    validation_scenes,
)
from seg4diff_jax.models.vae import VAE, VAEConfig
from seg4diff_jax.parallel import on_host
from seg4diff_jax.passes import encode_images, to_model_range
from seg4diff_jax.training.loop import RunConfig, Task
from seg4diff_jax.training.optimizers import OptimizerConfig
from seg4diff_jax.training.precision import Dtype
from seg4diff_jax.training.state import fresh


@dataclass(frozen=True)
class Objective:
    """Weights beside the pixels' absolute error, whose own is 1.

    Attributes:
      edges: of the absolute error of differences between neighbouring pixels.
      divergence: of the posterior's divergence from a unit normal, per latent number.
      distances: of the relative error of distances between latents, which should be those between the pieces of
        picture they stand for. Detail that nothing foretells then weighs little in latents, as it does in pixels;
        without this, latents come out white, and most of what a flow on them learns is noise.
    """

    edges: float = 1.0
    divergence: float = 1e-4
    distances: float = 0.0

    def __post_init__(self):
        if found := self.problems():
            raise ValueError("\n".join(found))

    def problems(self) -> list[str]:
        """What does not fit, a sentence each."""
        return infinite(vars(self), "objective.")


@dataclass(frozen=True)
class AutoencoderConfig:
    """Configuration of the task.

    Attributes:
      measured: training scenes over which the latents' mean and deviation are taken.
      dtype: of the computation; parameters are fp32.
      export_dtype: of the written weights.
    """

    run: RunConfig
    model: VAEConfig
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    data: SceneConfig = field(default_factory=SceneConfig)
    objective: Objective = field(default_factory=Objective)
    measured: int = 2048
    dtype: Dtype = "float32"
    export_dtype: Dtype = "float16"


def task(config: AutoencoderConfig) -> Task:
    # Factors are measured after training: until then latents are what the encoder gives.
    model = replace(config.model, scaling_factor=1.0, shift_factor=0.0)
    data = config.data
    return Task(
        name="autoencoder",
        init=fresh(lambda rngs: VAE(model, dtype=jnp.dtype(config.dtype), rngs=rngs)),
        loss=partial(loss, objective=config.objective),
        source=training_scenes(data, ("image",)),
        evaluate=partial(evaluate, source=validation_scenes(data, ("image",))),
        best="psnr",
        export=partial(export, config=config),
        item=scene_name("train"),
    )


def loss(
    vae: VAE, batch: Batch, key: PRNGKeyArray, *, objective: Objective
) -> tuple[Float[Array, ""], dict[str, Float[Array, ""]]]:
    """Of reconstructions from latents drawn from the posterior."""
    pixels = to_model_range(batch["image"])
    mean, log_variance = (moment.astype(jnp.float32) for moment in vae.moments(pixels))
    for_sample, for_pairs = jax.random.split(key)
    latents = mean + jnp.exp(0.5 * log_variance) * jax.random.normal(for_sample, mean.shape)
    error = vae.decode(latents).astype(jnp.float32) - pixels
    parts = {
        "pixels": jnp.abs(error).mean(),
        "edges": jnp.abs(jnp.diff(error, axis=1)).mean() + jnp.abs(jnp.diff(error, axis=2)).mean(),
        "divergence": 0.5 * (jnp.square(mean) + jnp.exp(log_variance) - 1 - log_variance).mean(),
        "distances": distance_error(mean, pixels, for_pairs),
    }
    weights = {"pixels": 1.0} | asdict(objective)
    return sum((weight * parts[name] for name, weight in weights.items()), start=jnp.zeros(())), parts


def distance_error(
    latents: Float[Array, "batch rows columns channels"],
    pixels: Float[Array, "batch height width 3"],
    key: PRNGKeyArray,
) -> Float[Array, ""]:
    """Mean error, relative to the mean, of squared distances between random pairs of latents.

    They should be, for each channel of a latent, those of the pixels under it, for each number in them.
    """
    batch, rows, columns, _ = latents.shape
    factor = pixels.shape[1] // rows
    pieces = pixels.reshape(batch, rows, factor, columns, factor, 3).transpose(0, 1, 3, 2, 4, 5)
    order = jax.random.permutation(key, batch * rows * columns)

    def squared(values: Array) -> Array:
        flat = values.reshape(len(order), -1)
        return jnp.square(flat - flat[order]).mean(axis=1)

    wanted = squared(pieces)
    return jnp.abs(squared(latents) - wanted).mean() / wanted.mean()


@jax.jit
def _reconstruction_error(vae: VAE, image: Array) -> Float[Array, " batch"]:
    pixels = to_model_range(image)
    shown = jnp.clip(vae.decode(vae.encode(pixels)).astype(jnp.float32), -1, 1)
    return jnp.square((shown - pixels) / 2).mean(axis=(1, 2, 3))


def evaluate(vae: VAE, *, source: DataSource, batch_size: int = 16) -> dict[str, float]:
    """`psnr` in dB: of the mean squared error over all pictures, from the posterior's mean."""
    errors = [
        on_host(_reconstruction_error(vae, batch["image"]))[:count]
        for batch, count in evaluation_batches(source, batch_size)
    ]
    return {"psnr": float(-10 * np.log10(np.concatenate(errors).mean()))}


def latent_moments(vae: VAE, source: DataSource, batch_size: int = 16) -> tuple[float, float]:
    """Mean and standard deviation of the latents' numbers over all channels, places and pictures."""
    total, squares, numbers = 0.0, 0.0, 0
    for batch, count in evaluation_batches(source, batch_size):
        latents = np.asarray(encode_images(vae, batch["image"]), np.float64)[:count]
        total, squares, numbers = total + latents.sum(), squares + np.square(latents).sum(), numbers + latents.size
    mean = float(total / numbers)
    return mean, float(np.sqrt(squares / numbers - mean**2))


def diffusers_config(config: VAEConfig, size: int) -> dict[str, Any]:
    """As diffusers writes an AutoencoderKL's `config.json`."""
    levels = len(config.block_out_channels)
    return {
        "_class_name": "AutoencoderKL",
        "act_fn": "silu",
        "down_block_types": ["DownEncoderBlock2D"] * levels,
        "up_block_types": ["UpDecoderBlock2D"] * levels,
        "force_upcast": True,
        "latents_mean": None,
        "latents_std": None,
        "sample_size": size,
        **asdict(config),
        "block_out_channels": list(config.block_out_channels),
    }


def export(vae: VAE, directory: Path, *, config: AutoencoderConfig) -> None:
    """Write `vae/` with the measured factors."""
    from seg4diff_jax.convert.staging import staged_directory
    from seg4diff_jax.convert.write import write_component, write_index

    data = config.data
    mean, deviation = latent_moments(vae, SceneItems("train", min(config.measured, data.train), data.size, ("image",)))
    measured = replace(config.model, scaling_factor=round(1 / deviation, 5), shift_factor=round(mean, 5))
    with staged_directory(directory) as work:
        write_component(work, "vae", diffusers_config(measured, data.size), vae, config.export_dtype)
        write_index(work)
