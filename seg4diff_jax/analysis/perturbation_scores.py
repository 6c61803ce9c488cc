"""Scores of pictures with one block perturbed at a time, against the unperturbed picture of the same prompt and seed.

The paper shows such scores by block (Seg4Diff, appendix B.5). It names neither the CLIP nor the DINO.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from jaxtyping import Float, UInt8

from seg4diff_jax.analysis.picture_scores import PictureScorers
from seg4diff_jax.analysis.summary import Spread


@dataclass(frozen=True)
class PerturbationScores:
    """Scores of every sample: one prompt with one seed.

    Attributes:
      blocks: the blocks that were perturbed, each by itself.
      plain: scores of the unperturbed pictures, by the score's name.
      perturbed: scores of the pictures with each block perturbed.
    """

    blocks: tuple[int, ...]
    plain: Mapping[str, Float[np.ndarray, " samples"]]
    perturbed: Mapping[str, Float[np.ndarray, "samples blocks"]]

    @property
    def samples(self) -> int:
        return len(self.plain["CLIP-T"])

    @property
    def by_block(self) -> dict[str, Spread]:
        """Mean over samples of each score for each block, with its standard error, which is 0 for one sample."""
        return {name: Spread(*_mean_and_error(scores)) for name, scores in self.perturbed.items()}

    @property
    def plain_clip_t(self) -> float:
        """Mean CLIP-T of the unperturbed pictures."""
        return float(np.mean(self.plain["CLIP-T"], dtype=np.float64))

    @property
    def lowest(self) -> dict[str, int]:
        """The block whose perturbation lowers each score most."""
        return {name: self.blocks[int(np.argmin(spread.mean))] for name, spread in self.by_block.items()}


def score_sample(
    scorers: PictureScorers, pictures: Sequence[UInt8[np.ndarray, "height width 3"]], prompt: str
) -> dict[str, Float[np.ndarray, " pictures"]]:
    """Returns the scores of a sample's pictures, the unperturbed one first, which is the reference of all."""
    count = len(pictures)
    return scorers.scores(pictures, [pictures[0]] * count, [prompt] * count)


def gathered_scores(
    samples: Sequence[Mapping[str, Float[np.ndarray, " pictures"]]], blocks: Sequence[int]
) -> PerturbationScores:
    """Puts the scores of samples, as `score_sample` returns them, together. There is at least one."""
    each = {name: np.stack([sample[name] for sample in samples]) for name in samples[0]}
    plain, perturbed = ({name: every[:, part] for name, every in each.items()} for part in (0, slice(1, None)))
    return PerturbationScores(tuple(blocks), plain, perturbed)


def _mean_and_error(
    scores: Float[np.ndarray, "samples blocks"],
) -> tuple[Float[np.ndarray, " blocks"], Float[np.ndarray, " blocks"]]:
    mean, count = scores.mean(axis=0, dtype=np.float64), len(scores)
    error = scores.std(axis=0, ddof=1, dtype=np.float64) / np.sqrt(count) if count > 1 else np.zeros_like(mean)
    return mean, error
