"""The DINO or DINOv2 model that holds pictures against other pictures."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, UInt8

from seg4diff_jax.analysis import preprocessing
from seg4diff_jax.analysis.clip_score import unit_vectors
from seg4diff_jax.analysis.embeddings import embed_pictures
from seg4diff_jax.analysis.preprocessing import Preprocessing, read_preprocessing
from seg4diff_jax.convert.errors import CheckpointError
from seg4diff_jax.convert.sources.transformers_folder import find_folder, load_dino_model
from seg4diff_jax.models.dino import DINO
from seg4diff_jax.numerics import settled


@jax.jit
def class_vectors(
    model: DINO, pixels: Float[Array, "pictures height width channels"]
) -> Float[Array, "pictures features"]:
    """Returns the unit vectors of pictures. Pixels are normalised as in the model's training."""
    return unit_vectors(model(pixels))


@dataclass(frozen=True)
class Dino:
    """A DINO or DINOv2, with what prepares its pictures.

    Attributes:
      name: what `load_dino` was asked for.
    """

    model: DINO
    preprocessing: Preprocessing
    name: str

    @settled()
    def embed_pictures(
        self, pictures: Sequence[UInt8[np.ndarray, "_ _ 3"]], *, batch: int = 32
    ) -> Float[Array, "pictures features"]:
        """Returns the unit vectors of pictures, `batch` at a time. Raises ValueError if there are none."""
        return embed_pictures(lambda pixels: class_vectors(self.model, pixels), pictures, self.preprocessing, batch)


@settled()
def load_dino(model: str | Path) -> Dino:
    """Loads a DINO or DINOv2 in fp32.

    Args:
      model: a directory with transformers' ViTModel or Dinov2Model, as facebook/dino-vits16 and facebook/dinov2-small
        are, or the Hub id of such a model.

    Raises:
      CheckpointError: the model is absent or damaged, or its preprocessing does not fit it.
    """
    folder = find_folder(model, (preprocessing.FILE,), "facebook/dino-vits16")
    loaded = load_dino_model(folder, dtype=jnp.float32)
    side, patch = loaded.config.image_size, loaded.config.patch_size
    square = replace(preprocessing.DINO, resize=(side, side))
    found = read_preprocessing(folder, preprocessing.DINOV2 if loaded.config.has_layer_scale else square)
    if found.size[0] % patch or found.size[1] % patch:
        raise CheckpointError(
            f"{folder / preprocessing.FILE}: pictures are prepared as {found.size[0]} x {found.size[1]}; expected "
            f"multiples of the patch size, {patch}"
        )
    return Dino(loaded, found, str(model))
