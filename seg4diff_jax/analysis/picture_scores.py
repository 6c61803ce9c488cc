"""Holds pictures against reference pictures of the same prompts, and against the prompts: CLIP-I, CLIP-T and DINO.

DreamBooth (Ruiz et al., 2023) uses the three: cosines of CLIP's embeddings of two pictures (CLIP-I), of a picture and
its prompt (CLIP-T), and of DINO's embeddings of two pictures.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from jaxtyping import Array, Float, Shaped, UInt8

from seg4diff_jax.analysis.clip import Clip
from seg4diff_jax.analysis.dino import Dino

Pictures = Sequence[UInt8[np.ndarray, "_ _ 3"]]


def clip_i(clip: Clip, pictures: Pictures, references: Pictures, *, batch: int = 32) -> Float[np.ndarray, " pictures"]:
    """Returns the cosine of CLIP's embeddings of each picture and its reference, -1 to 1.

    `batch` pictures are embedded at a time. Raises ValueError if there are no pictures, or not as many references.
    """
    _check_pairs(pictures, references, "reference pictures")
    return paired_cosines(clip.embed_pictures(pictures, batch=batch), clip.embed_pictures(references, batch=batch))


def clip_t(
    clip: Clip, pictures: Pictures, prompts: Sequence[str], *, batch: int = 32
) -> Float[np.ndarray, " pictures"]:
    """Returns the cosine of CLIP's embeddings of each picture and its prompt, -1 to 1.

    CLIPScore is this cosine scaled (`clip_scores`). Arguments and errors are as for `clip_i`.
    """
    _check_pairs(pictures, prompts, "prompts")
    return paired_cosines(clip.embed_pictures(pictures, batch=batch), clip.embed_prompts(prompts, batch=batch))


def dino(model: Dino, pictures: Pictures, references: Pictures, *, batch: int = 32) -> Float[np.ndarray, " pictures"]:
    """Returns the cosine of DINO's embeddings of each picture and its reference, -1 to 1.

    Arguments and errors are as for `clip_i`.
    """
    _check_pairs(pictures, references, "reference pictures")
    return paired_cosines(model.embed_pictures(pictures, batch=batch), model.embed_pictures(references, batch=batch))


@dataclass(frozen=True)
class PictureScorers:
    """The models that score pictures. Without a DINO its score is left out."""

    clip: Clip
    dino: Dino | None = None

    @property
    def models(self) -> dict[str, str]:
        """The name of each score, and the name of the model that it comes from."""
        names = {"CLIP-I": self.clip.name, "CLIP-T": self.clip.name}
        return names if self.dino is None else {**names, "DINO": self.dino.name}

    def scores(
        self, pictures: Pictures, references: Pictures, prompts: Sequence[str], *, batch: int = 32
    ) -> dict[str, Float[np.ndarray, " pictures"]]:
        """Returns every score of each picture, by the score's name. Reference i and prompt i are picture i's own.

        The pictures are embedded once by each model. Raises ValueError as `clip_i` does.
        """
        _check_pairs(pictures, references, "reference pictures")
        _check_pairs(pictures, prompts, "prompts")
        shown = self.clip.embed_pictures(pictures, batch=batch)
        found = {
            "CLIP-I": paired_cosines(shown, self.clip.embed_pictures(references, batch=batch)),
            "CLIP-T": paired_cosines(shown, self.clip.embed_prompts(prompts, batch=batch)),
        }
        if self.dino is not None:
            found["DINO"] = dino(self.dino, pictures, references, batch=batch)
        return found


def paired_cosines(
    first: Float[Array, "pictures features"], second: Float[Array, "pictures features"]
) -> Float[np.ndarray, " pictures"]:
    """Returns the cosines of unit vectors, row by row."""
    products = np.asarray(first, np.float64) * np.asarray(second, np.float64)
    return products.sum(axis=1).clip(-1, 1).astype(np.float32)


def _check_pairs(pictures: Pictures, others: Sequence[Shaped[np.ndarray, ...]] | Sequence[str], what: str) -> None:
    if isinstance(others, str):
        raise TypeError(f"expected a list of {what}, found the string {others!r:.80}")
    if not len(pictures) or len(pictures) != len(others):
        raise ValueError(
            f"expected pictures, and as many {what}; found {len(pictures)} pictures and {len(others)} {what}"
        )
