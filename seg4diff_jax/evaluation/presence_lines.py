"""What people are shown of presence: a line for each kind of prompts and score, averaged over seeds."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass

from seg4diff_jax.evaluation.further_figures import Bin, PresenceFigures
from seg4diff_jax.evaluation.rows import Row, Setting, averaged, best_setting, by_setting, mean_figures
from seg4diff_jax.segmentation.presence import SCORES

FIGURES = {
    "auc": "AUC",
    "auc_in_image": "AUC in an image",
    "f1": "F1",
    "threshold": "threshold",
    "calibration_error": "calibration error",
}
"""Figures of a line, by their names in `results.json`; percentages."""
Score = tuple[float, float] | None
"""Mean over seeds and spread, percent; None where there was nothing to score."""


@dataclass(frozen=True)
class PresenceLine:
    """How well one score of presence tells what is there. `bins` are those of all seeds together."""

    score: str
    figures: dict[str, Score]
    bins: tuple[Bin, ...]


@dataclass(frozen=True)
class Asked:
    """One kind of prompts, at the block, head and noise level of its highest mIoU.

    Attributes:
      miou: with these prompts; `present` is that of the same setting where present classes alone are asked for, None if
        this was not measured.
      f1_of_all: F1 if every class asked for is said to be there.
      lines: one for each score of presence.
    """

    prompts: str
    setting: Setting
    miou: Score
    present: Score
    f1_of_all: Score
    lines: tuple[PresenceLine, ...]


def presence_lines(rows: Sequence[Row]) -> list[Asked]:
    """Returns what is shown of rows that have scores of presence, by kind of prompts; nothing if none have."""
    found = []
    for kind in dict.fromkeys(row.prompts for row in rows if row.further.presence):
        best = best_setting([row for row in rows if row.prompts == kind])
        settings = by_setting(rows)
        own, present = settings[best], settings.get(best._replace(prompts="present"), [])
        lines = []
        for name in SCORES:
            figures = [row.further.presence[name] for row in own if row.further.presence]
            plain = [asdict(each) for each in figures]
            lines.append(PresenceLine(name, averaged(plain, [*FIGURES, "f1_of_all"]), pooled(figures)))
        of_all = lines[0].figures["f1_of_all"]
        found.append(Asked(kind, best, _miou(own), _miou(present), of_all, tuple(lines)))
    return found


def _miou(rows: Sequence[Row]) -> Score:
    return mean_figures(rows, ["miou"])["miou"]


def pooled(figures: Sequence[PresenceFigures]) -> tuple[Bin, ...]:
    """Returns the bins of several seeds as those of one set of cases."""
    return tuple(_together(bins) for bins in zip(*(each.reliability for each in figures), strict=True))


def _together(bins: Sequence[Bin]) -> Bin:
    filled, cases = [one for one in bins if one.cases], sum(one.cases for one in bins)
    mean = lambda values: sum(one.cases * value for one, value in zip(filled, values, strict=True)) / cases
    if not cases:
        return Bin(0, None, None)
    return Bin(cases, mean([one.score for one in filled]), mean([one.present for one in filled]))
