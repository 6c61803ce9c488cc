"""The CLIP model that scores pictures, in a checkpoint beside its text_encoder, or a whole CLIP of transformers."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, UInt8

from seg4diff_jax.analysis import preprocessing
from seg4diff_jax.analysis.clip_score import cosine_similarities, picture_vectors, prompt_vectors
from seg4diff_jax.analysis.embeddings import embed_in_batches, embed_pictures
from seg4diff_jax.analysis.preprocessing import Preprocessing, read_preprocessing
from seg4diff_jax.convert.errors import CheckpointError
from seg4diff_jax.convert.load import load_component
from seg4diff_jax.convert.sources.open import MINIATURE
from seg4diff_jax.convert.sources.transformers_folder import find_folder, load_image_encoder, load_whole_clip
from seg4diff_jax.models.clip import CLIPText
from seg4diff_jax.models.clip_vision import CLIPVision
from seg4diff_jax.numerics import settled
from seg4diff_jax.text import Tokenizer, load_tokenizer, tokenize_clip

TOKENIZER_FILES = ("tokenizer.json", "vocab.json", "merges.txt", "tokenizer_config.json", "special_tokens_map.json")


@dataclass(frozen=True)
class Clip:
    """A CLIP's text and vision encoder, with what prepares their inputs.

    Attributes:
      name: what `load_clip` was asked for.
    """

    text: CLIPText
    vision: CLIPVision
    tokenizer: Tokenizer
    preprocessing: Preprocessing
    name: str

    @settled()
    def similarities(
        self, pictures: Sequence[UInt8[np.ndarray, "_ _ 3"]], prompts: Sequence[str], *, batch: int = 32
    ) -> Float[np.ndarray, "pictures prompts"]:
        """Returns the cosine similarity of every picture with every prompt, -1 to 1.

        `batch` pictures or prompts are embedded at a time. Raises ValueError if there are no pictures or no prompts.
        """
        shown = self.embed_pictures(pictures, batch=batch)
        return np.asarray(cosine_similarities(shown, self.embed_prompts(prompts, batch=batch)))

    @settled()
    def embed_pictures(
        self, pictures: Sequence[UInt8[np.ndarray, "_ _ 3"]], *, batch: int = 32
    ) -> Float[Array, "pictures projection"]:
        """Returns the unit vectors of pictures. Raises ValueError if there are none."""
        return embed_pictures(lambda pixels: picture_vectors(self.vision, pixels), pictures, self.preprocessing, batch)

    @settled()
    def embed_prompts(self, prompts: Sequence[str], *, batch: int = 32) -> Float[Array, "prompts projection"]:
        """Returns the unit vectors of prompts, in the same space. Raises ValueError if there are none."""
        ids = tokenize_clip(self.tokenizer, prompts, self.text.config.max_position_embeddings)
        return embed_in_batches(lambda rows: prompt_vectors(self.text, rows), ids, batch)


@settled()
def load_clip(model: str | Path) -> Clip:
    """Loads a CLIP in fp32.

    Args:
      model: one of
        - "miniature",
        - a directory with transformers' CLIPModel, as openai/clip-vit-large-patch14 is, or the Hub id of such a model,
        - a checkpoint's directory with the folders text_encoder, tokenizer and image_encoder. SD3's text_encoder is
          OpenAI's CLIP ViT-L/14. Its image encoder is not part of SD3. Save transformers'
          CLIPVisionModelWithProjection of openai/clip-vit-large-patch14 as `image_encoder`.

    Raises:
      CheckpointError: the model or a folder is absent or damaged, the two encoders project to different numbers of
        features, or the tokenizer or the preprocessing does not fit them.
    """
    beside = (preprocessing.FILE, *TOKENIZER_FILES)
    folder = MINIATURE if model == "miniature" else find_folder(model, beside, "openai/clip-vit-large-patch14")
    if (folder / "config.json").is_file():
        text, vision = load_whole_clip(folder, dtype=jnp.float32)
        return _with_inputs(text, vision, folder, folder, str(model))
    vision = load_image_encoder(folder / "image_encoder", dtype=jnp.float32)
    text = load_component(folder, "text_encoder", dtype=jnp.float32)
    spaces = text.config.projection_dim, vision.config.projection_dim
    if spaces[0] != spaces[1]:
        raise CheckpointError(
            f"{folder}: text_encoder projects to {spaces[0]} features and image_encoder to {spaces[1]}: they are "
            "not of one CLIP"
        )
    return _with_inputs(text, vision, folder / "tokenizer", folder / "image_encoder", str(model))


def _with_inputs(text: CLIPText, vision: CLIPVision, words: Path, pictures: Path, name: str) -> Clip:
    """Adds the tokenizer in the folder `words`, and the preprocessing in the folder `pictures`."""
    try:
        tokenizer = load_tokenizer("tokenizer", words)
    except (OSError, ValueError) as error:
        raise CheckpointError(str(error)) from error
    if (ids := max(tokenizer.get_vocab().values()) + 1) > text.config.vocab_size:
        raise CheckpointError(
            f"{words}: the tokenizer makes ids up to {ids - 1}, the text encoder embeds {text.config.vocab_size}"
        )
    side = vision.config.image_size
    found = read_preprocessing(pictures, replace(preprocessing.CLIP, resize=side, crop=(side, side)))
    if found.size != (side, side):
        raise CheckpointError(
            f"{pictures / preprocessing.FILE}: pictures are prepared as {found.size[0]} x {found.size[1]}; this CLIP "
            f"sees {side} x {side}"
        )
    return Clip(text, vision, tokenizer, found, name)
