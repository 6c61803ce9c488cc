"""Selects items of a source by the names that a file lists."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path, PurePosixPath
from typing import Protocol, runtime_checkable

from seg4diff_jax.data.errors import FolderError
from seg4diff_jax.data.loader import Item
from seg4diff_jax.data.text_files import read_lines

EXPECTED = "names of images, one a line"
MOST_NAMED = 3
"""Most absent names that a message lists."""


@runtime_checkable
class Named(Protocol):
    """A random-access source whose items have names."""

    @property
    def names(self) -> Sequence[str]: ...
    def __len__(self) -> int: ...
    def __getitem__(self, index: int, /) -> Item: ...


class Subset:
    """A source of the items with some numbers of another source, in that order."""

    def __init__(self, source: Named, places: Sequence[int]):
        self.source, self.places = source, places

    @property
    def names(self) -> list[str]:
        names = self.source.names
        return [names[place] for place in self.places]

    def __len__(self) -> int:
        return len(self.places)

    def __getitem__(self, index: int, /) -> Item:
        return self.source[self.places[index]]


def listed_places(file: str | Path, names: Sequence[str], where: str) -> list[int]:
    """Returns the indices in `names` of the images that a file lists, in the file's order.

    Args:
      file: a file with one name per line, alone or as a path, with or without suffix. Further columns are ignored,
        unless the whole line is a name. Blank lines are skipped.
      where: what the names belong to, for messages.

    Raises FolderError if the file cannot be read, lists nothing, or lists an unknown image or an image twice.
    """
    place_of = {name: place for place, name in enumerate(names)}
    found: dict[int, int] = {}
    absent: list[str] = []
    for number, line in enumerate(read_lines(file, EXPECTED), start=1):
        if not line:
            continue
        place = next((place_of[name] for name in _spellings(line) if name in place_of), None)
        if place is None:
            absent.append(f"{line} (line {number})")
            continue
        if place in found:
            raise FolderError(
                f"{file} lists {names[place]} in line {found[place]} and in line {number}; expected each image once"
            )
        found[place] = number
    if absent:
        more = f" and {len(absent) - MOST_NAMED} more" if len(absent) > MOST_NAMED else ""
        raise FolderError(
            f"{file} lists what is no image of {where}: {', '.join(absent[:MOST_NAMED])}{more}; expected names such as "
            f"{names[0]}"
        )
    if not found:
        raise FolderError(f"{file} lists nothing; expected {EXPECTED}")
    return list(found)


def _spellings(line: str) -> Iterator[str]:
    """Yields the names that a line may mean, the most literal first."""
    for text in (line, *line.split()[:1]):
        last = PurePosixPath(text.replace("\\", "/")).name
        yield text
        yield last
        yield PurePosixPath(last).stem
        yield PurePosixPath(last).stem.removesuffix("_leftImg8bit")  # Cityscapes' images; its labels end otherwise
