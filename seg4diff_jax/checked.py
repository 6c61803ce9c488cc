"""A base of dataclasses whose values are checked when they are made."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)  # or jsonargparse would take a section for a class to be named by its path
class Checked:
    """A dataclass that raises ValueError with all its `problems` when a value is made.

    `configuration.unchecked` makes values that are not checked, so that the problems of several are named together.
    """

    def __post_init__(self) -> None:
        if found := self.problems():
            raise ValueError("\n".join(found))

    def problems(self) -> list[str]:
        """Returns a sentence for each thing that does not fit."""
        raise NotImplementedError
