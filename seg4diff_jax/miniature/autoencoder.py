"""The miniature's autoencoder: an AutoencoderKL trained on scenes.

The reconstruction loss is the absolute error of pixels and of differences between neighbouring pixels (edges). A small
Kullback-Leibler divergence keeps latents near a unit normal. There is no adversarial and no perceptual loss. After
training, the latents' mean and standard deviation over training scenes become the shift and scaling factor.
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

from seg4diff_jax.checked import Checked
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
class Objective(Checked):
    """Weights of the losses, relative to the absolute error of pixels, whose weight is 1.

    Attributes:
      edges: weight of the absolute error of differences between neighbouring pixels.
      divergence: weight of the posterior's divergence from a unit normal, per latent number.
      distances: weight of the relative error of distances between latents, see `distance_error`. With it, details that
        cannot be predicted have little weight in latents, as in pixels. Without it, latents are nearly white, and most
        of what a flow on them learns is noise.
    """

    edges: float = 1.0
    divergence: float = 1e-4
    distances: float = 0.0

    def problems(self) -> list[str]:
        """Returns a sentence for each option that does not fit."""
        return infinite(vars(self), "objective.")


@dataclass(frozen=True)
class AutoencoderConfig:
    """Configuration of the task.

    Attributes:
      measured: number of training scenes over which the latents' mean and standard deviation are measured.
      dtype: dtype of the computation; parameters are fp32.
      export_dtype: dtype of the exported weights.
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
    # Shift and scaling factor are measured after training; during training latents are not scaled.
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
    """Returns the loss of reconstructions from latents drawn from the posterior, and its parts."""
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
    """Returns the mean error of squared distances between random pairs of latents, relative to their mean.

    The target is the squared distance between the pieces of picture under the two latents. Both distances are means
    over the numbers of a latent, or of a piece.
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
    """Returns `psnr` in dB, of the mean squared error over all pictures, with the posterior's mean as latents."""
    errors = [
        on_host(_reconstruction_error(vae, batch["image"]))[:count]
        for batch, count in evaluation_batches(source, batch_size)
    ]
    return {"psnr": float(-10 * np.log10(np.concatenate(errors).mean()))}


def latent_moments(vae: VAE, source: DataSource, batch_size: int = 16) -> tuple[float, float]:
    """Returns mean and standard deviation of the latents over all channels, positions and pictures."""
    total, squares, numbers = 0.0, 0.0, 0
    for batch, count in evaluation_batches(source, batch_size):
        latents = np.asarray(encode_images(vae, batch["image"]), np.float64)[:count]
        total, squares, numbers = total + latents.sum(), squares + np.square(latents).sum(), numbers + latents.size
    mean = float(total / numbers)
    return mean, float(np.sqrt(squares / numbers - mean**2))


def diffusers_config(config: VAEConfig, size: int) -> dict[str, Any]:
    """Returns the `config.json` that diffusers writes for an AutoencoderKL."""
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
    """Writes `vae/` with the measured shift and scaling factor."""
    from seg4diff_jax.convert.staging import staged_directory
    from seg4diff_jax.convert.write import write_component, write_index

    data = config.data
    mean, deviation = latent_moments(vae, SceneItems("train", min(config.measured, data.train), data.size, ("image",)))
    measured = replace(config.model, scaling_factor=round(1 / deviation, 5), shift_factor=round(mean, 5))
    with staged_directory(directory) as work:
        write_component(work, "vae", diffusers_config(measured, data.size), vae, config.export_dtype)
        write_index(work)
