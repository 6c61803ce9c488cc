"""Means and spreads over prompts, images and seeds of every block's statistics, and which block they point to."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from jaxtyping import Float

from seg4diff_jax.analysis.prompt_statistics import PromptStatistics, over_tokens


class Spread(NamedTuple):
    """Mean and standard deviation over samples, of each block; the deviation of one sample is 0. NaN: no sample has it.

    A sample is one prompt with one seed, or one image.
    """

    mean: Float[np.ndarray, " blocks"]
    deviation: Float[np.ndarray, " blocks"]


@dataclass(frozen=True)
class Summary:
    """Statistics of every block over samples.

    Attributes:
      samples: how many there are.
      uniform: how much of its attention the image would give to text without any preference, mean over samples.
      quantities: shares of attention, 0 to 1 and averaged over heads, value norms, and similarities, by name.
      text_shares: how much of the image's attention is on text, by head; means over samples.
      norm_ratios: the mean norm of each head's values of text tokens, as a multiple of the image tokens'.
      mean_ious: each block's mean IoU in percent, where images have labels.
    """

    samples: int
    uniform: float
    quantities: dict[str, Spread]
    text_shares: Float[np.ndarray, "blocks heads"]
    norm_ratios: Float[np.ndarray, "blocks heads"]
    mean_ious: Float[np.ndarray, " blocks"] | None = None

    @property
    def candidates(self) -> dict[str, int]:
        """Blocks that stand out: by the paper's two hints to the expert without labels, by words, and by labels."""
        ratio = self.quantities["norm of text"].mean / self.quantities["norm of image"].mean
        on = {"most on text": "image to text", "most on words": "image to words"}
        found = {hint: self.quantities[name].mean for hint, name in on.items()} | {"largest text norm": ratio}
        found |= {} if self.mean_ious is None else {"best mIoU by labels": self.mean_ious}
        return {hint: int(np.nanargmax(values)) for hint, values in found.items() if not np.isnan(values).all()}


def summarize(found: Sequence[PromptStatistics]) -> Summary:
    """Summarizes statistics whose groups of tokens have the same names. Raises ValueError when there are none."""
    if not found:
        raise ValueError("there are no statistics: expected at least one prompt")
    each = [_quantities(one) for one in found]
    quantities = {name: _spread(np.concatenate([one[name] for one in each])) for name in each[0]}
    heads = np.concatenate([one.text_shares for one in found])
    ratios = np.concatenate([_head_norms(one, one.text_groups) / _head_norms(one, one.groups[:1]) for one in found])
    uniform = np.concatenate([one.uniform_text_shares for one in found])
    heads, ratios = (each.mean(axis=0, dtype=np.float64) for each in (heads, ratios))
    return Summary(len(uniform), float(uniform.mean()), quantities, heads, ratios)


def _quantities(found: PromptStatistics) -> dict[str, Float[np.ndarray, "samples blocks"]]:
    shares, similarity = np.asarray(found.blocks.shares), np.asarray(found.blocks.similarity)
    from_text = over_tokens(shares[..., 1:, 0].mean(axis=2), found.sizes[:, None, 1:])
    quantities = {
        "image to text": found.text_shares.mean(axis=2),
        "image to words": found.word_shares,
        "text to image": from_text,
        **{f"image to {group}": found.on(group).mean(axis=2) for group in found.text_groups},
        "norm of image": found.value_norms("image"),
        "norm of text": found.value_norms(*found.text_groups),
        "norm of words": found.value_norms(*found.prompt_groups),
    }
    words = [found.groups.index(group) for group in found.prompt_groups]
    for row, projection in enumerate(("queries", "keys", "values")):
        with_words = over_tokens(similarity[:, :, row, 0, words], found.sizes[:, None, words])
        quantities[f"{projection}: similarity of image and words"] = with_words
    return quantities


def _head_norms(found: PromptStatistics, groups: Sequence[str]) -> Float[np.ndarray, "samples blocks heads"]:
    places = [found.groups.index(group) for group in groups]
    norms = np.asarray(found.blocks.value_norms)[..., places]
    return over_tokens(norms, found.sizes[:, None, None, places])


def _spread(samples: Float[np.ndarray, "samples blocks"]) -> Spread:
    known = np.isfinite(samples)
    count = known.sum(axis=0)
    with np.errstate(invalid="ignore", divide="ignore"):
        mean = np.where(known, samples, 0).sum(axis=0) / count
        squares = np.where(known, (samples - mean) ** 2, 0).sum(axis=0)
    return Spread(mean, np.sqrt(squares / np.maximum(count - 1, 1)))
