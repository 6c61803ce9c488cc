"""What a step of the paper came to, as the page shows it: claims with verdicts, plots, tables and pictures."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, NamedTuple

from markupsafe import Markup

from seg4diff_jax.analysis.paired_difference import PairedDifference
from seg4diff_jax.reproduction.subject import OnProgress, Subject

Verdict = Literal["holds", "does not hold", "not testable here"]
Measured = Mapping[str, Any]
"""Plain values, as JSON has them."""


class Claim(NamedTuple):
    """A finding of the paper, and what was found here.

    Attributes:
      where: figure, table or section of the paper.
      paper: the finding, in our words.
      rule: what must be so for it to hold here.
      found: the figures by which it was decided.
    """

    where: str
    paper: str
    rule: str
    found: str
    verdict: Verdict


class Plot(NamedTuple):
    """A plot of the page. `legend`: the class and the text of each line's entry."""

    caption: str
    drawing: Markup
    legend: Sequence[tuple[str, str]] = ()
    is_wide: bool = False


class Table(NamedTuple):
    """A table of the page. `best`: index of the row that is emphasised."""

    title: str
    columns: Sequence[str]
    rows: Sequence[tuple[str, Sequence[str]]]
    best: int | None = None


@dataclass(frozen=True)
class Part:
    """A section of the page.

    Attributes:
      about: what was measured and how, in sentences.
      pictures: captions and file names, in the folder of the run.
    """

    title: str
    about: str
    claims: Sequence[Claim] = ()
    plots: Sequence[Plot] = ()
    tables: Sequence[Table] = ()
    pictures: Sequence[tuple[str, str]] = ()


Measure = Callable[[Subject, Path, OnProgress], dict[str, Any]]
Present = Callable[[Subject, Mapping[str, Measured]], Part]


class Step(NamedTuple):
    """A step of the paper.

    Attributes:
      name: of its file in `progress`.
      pictures: files that it writes into the folder.
      doing: what it does, for the progress bar.
      measure: measures, writes its pictures into the folder, and returns what was found; None: it only sums up others.
      present: makes the section of the page from what the steps found, by name.
    """

    name: str
    doing: str
    measure: Measure | None
    present: Present
    pictures: tuple[str, ...] = ()


def decided(holds: bool | None) -> Verdict:
    """Returns the verdict of a rule; None: it could not be decided."""
    return "not testable here" if holds is None else "holds" if holds else "does not hold"


ABOVE_ZERO = "The paired difference of 100 x cosine is above 0, and its 95 % interval excludes 0."
FEWEST = 6
"""Prompts below which an interval over prompts decides nothing: of so few it is too narrow."""


def decided_by(difference: PairedDifference, prompts: int) -> Verdict:
    """Returns whether a difference is above 0; not testable if its interval includes 0, or of fewer than `FEWEST`."""
    return decided(difference.mean > 0 if difference.excludes_zero and prompts >= FEWEST else None)


def in_words(difference: PairedDifference) -> str:
    return f"{difference.mean:+.2f}, interval {difference.low:+.2f} to {difference.high:+.2f}"
