"""The CLIP model that scores pictures: a checkpoint's text_encoder and tokenizers, and an image_encoder beside them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Shaped, UInt8
from PIL import Image

from seg4diff_jax.analysis.clip_score import cosine_similarities, picture_vectors, prompt_vectors
from seg4diff_jax.convert.errors import CheckpointError
from seg4diff_jax.convert.files import read_json
from seg4diff_jax.convert.load import load_component
from seg4diff_jax.convert.sources.transformers_folder import load_image_encoder
from seg4diff_jax.models.clip import CLIPText
from seg4diff_jax.models.clip_vision import CLIPVision
from seg4diff_jax.numerics import settled
from seg4diff_jax.quoting import quoted
from seg4diff_jax.text import Tokenizers, load_tokenizers, tokenize

CLIP_MEAN, CLIP_STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)
"""Mean and standard deviation of pixels in 0..1 for the published encoders, for folders that do not name their own."""


@dataclass(frozen=True)
class Clip:
    """A CLIP's text and vision encoder, with the tokenizers and the pixel normalisation for their inputs."""

    text: CLIPText
    vision: CLIPVision
    tokenizers: Tokenizers
    mean: tuple[float, ...] = CLIP_MEAN
    std: tuple[float, ...] = CLIP_STD

    @settled()
    def similarities(
        self, pictures: Sequence[UInt8[np.ndarray, "_ _ 3"]], prompts: Sequence[str], *, batch: int = 32
    ) -> Float[np.ndarray, "pictures prompts"]:
        """Returns the cosine similarity of every picture with every prompt, -1 to 1.

        `batch` pictures or prompts are embedded at a time. Raises ValueError if there are no pictures or no prompts.
        """
        if not pictures:
            raise ValueError("expected at least one picture, found none")
        ids = tokenize(self.tokenizers, prompts).clip_l
        pixels = np.stack([self.pixels(picture) for picture in pictures])
        return np.asarray(
            cosine_similarities(
                _in_batches(lambda rows: picture_vectors(self.vision, rows), pixels, batch),
                _in_batches(lambda rows: prompt_vectors(self.text, rows), np.asarray(ids), batch),
            )
        )

    def pixels(self, picture: UInt8[np.ndarray, "height width 3"]) -> Float[np.ndarray, "size size 3"]:
        """Prepares a picture as in CLIP's training: shorter side to its size (bicubic), middle square, normalised."""
        size = self.vision.config.image_size
        height, width = picture.shape[:2]
        image = Image.fromarray(picture)
        if min(height, width) != size:
            shorter = min(height, width)
            image = image.resize((size * width // shorter, size * height // shorter), Image.Resampling.BICUBIC)
        left, top = (image.width - size) // 2, (image.height - size) // 2
        square = np.asarray(image.crop((left, top, left + size, top + size)), np.float32) / np.float32(255)
        return (square - np.asarray(self.mean, np.float32)) / np.asarray(self.std, np.float32)


def _in_batches(
    embed: Callable[[Array], Array], rows: Shaped[np.ndarray, "rows ..."], batch: int
) -> Float[Array, "rows projection"]:
    parts = []
    for start in range(0, len(rows), batch):
        part = rows[start : start + batch]
        # The batch is filled up with its first row, so that one compiled program serves every batch.
        filled = np.concatenate([part, np.repeat(part[:1], min(batch, len(rows)) - len(part), axis=0)])
        parts.append(embed(jnp.asarray(filled))[: len(part)])
    return jnp.concatenate(parts)


@settled()
def load_clip(directory: str | Path) -> Clip:
    """Loads the folders text_encoder, tokenizer, tokenizer_2 and image_encoder of a checkpoint, in fp32.

    SD3's text_encoder is OpenAI's CLIP ViT-L/14. Its image encoder is not part of SD3. Save transformers'
    CLIPVisionModelWithProjection of openai/clip-vit-large-patch14 as `image_encoder`.

    Raises:
      CheckpointError: a folder is absent or damaged, or the two encoders project to different numbers of features.
    """
    directory = Path(directory).expanduser()
    vision = load_image_encoder(directory / "image_encoder", dtype=jnp.float32)
    text = load_component(directory, "text_encoder", dtype=jnp.float32)
    spaces = text.config.projection_dim, vision.config.projection_dim
    if spaces[0] != spaces[1]:
        raise CheckpointError(
            f"{directory}: text_encoder projects to {spaces[0]} features and image_encoder to {spaces[1]}: they are "
            "not of one CLIP"
        )
    try:
        tokenizers = load_tokenizers(directory)
    except (OSError, ValueError) as error:
        raise CheckpointError(str(error)) from error
    described = directory / "image_encoder" / "preprocessor_config.json"
    named = read_json(described) if described.is_file() else {}
    mean, std = named.get("image_mean", CLIP_MEAN), named.get("image_std", CLIP_STD)
    for key, numbers in (("image_mean", mean), ("image_std", std)):
        three = isinstance(numbers, list | tuple) and [type(each) in (int, float) for each in numbers] == [True] * 3
        if not three or (key == "image_std" and min(numbers) <= 0):
            raise CheckpointError(
                f"{described}: {key} is {quoted(numbers)}; expected a number for each of three channels"
            )
    return Clip(text, vision, tokenizers, tuple(mean), tuple(std))
