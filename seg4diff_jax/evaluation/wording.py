"""What prompts say beside, or instead of, the classes' own names: synonyms, a template, stop words, competitors."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from seg4diff_jax.configuration import LARGEST, parse_yaml
from seg4diff_jax.data.errors import FolderError
from seg4diff_jax.data.text_files import read_text
from seg4diff_jax.quoting import quoted
from seg4diff_jax.text import PLAIN, Wording

EXPECTED = "the names of each class, as in `sofa: [sofa, couch]`"


@dataclass(frozen=True)
class Words:
    """The words of prompts; by default the classes' own names alone.

    Attributes:
      file: where the synonyms are from.
      synonyms: the names that a class is asked for by instead of its own, by class; others keep their own name.
      wording: what stands around and after the names.
      competitors: words that are asked for beside the classes, and whose pixels are background.
    """

    file: str | None = None
    synonyms: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    wording: Wording = PLAIN
    competitors: tuple[str, ...] = ()

    def names(self, classes: Sequence[str], spelled: Sequence[str]) -> list[tuple[str, ...]]:
        """Returns the names of each class in prompts: its synonyms, or its spelled name."""
        return [self.synonyms.get(own, (name,)) for own, name in zip(classes, spelled, strict=True)]

    def plain(self) -> dict[str, Any]:
        """The words as `results.json` has them."""
        wording = {"template": self.wording.template, "stop_words": list(self.wording.stop_words)}
        return {"synonyms": self.file, **wording, "competitors": list(self.competitors)}


NO_WORDS = Words()


def read_synonyms(file: str) -> dict[str, tuple[str, ...]]:
    """Reads a YAML file of classes and their names, a word or a list of words for each class.

    Raises FolderError, which names the file and what is wrong with it, for anything else.
    """
    text = read_text(file, EXPECTED)
    if len(text) > LARGEST:
        raise FolderError(f"{file} has {len(text)} characters; expected {EXPECTED}, in at most {LARGEST}")
    try:
        found = parse_yaml(text, file)
    except ValueError as error:
        raise FolderError(f"{error}; expected {EXPECTED}") from None
    if not isinstance(found, dict) or not found:
        raise FolderError(f"{file} holds {quoted(found)}; expected {EXPECTED}")
    synonyms: dict[str, tuple[str, ...]] = {}
    for name, given in found.items():
        names = given if isinstance(given, list) else [given]
        if not names or not all(isinstance(each, str) and each.strip() for each in (name, *names)):
            raise FolderError(
                f"{file}: the names of {quoted(name)} are {quoted(given)}; expected {EXPECTED}, in quotes"
            )
        synonyms[name] = tuple(each.strip() for each in names)
    return synonyms


def check_words(words: Words, classes: Sequence[str], asked: Sequence[str], where: str) -> None:
    """Checks words against the classes of a set.

    Args:
      classes: the set's own names of all classes.
      asked: the names that prompts ask for the classes by, background left out.
      where: what the set is, for messages.

    Raises ValueError if synonyms are of no class of the set, or a competitor is one of its classes.
    """
    if unknown := [name for name in words.synonyms if name not in classes]:
        raise ValueError(
            f"{words.file} names synonyms of {', '.join(map(quoted, unknown[:3]))}, which {where} has no class of; "
            f"expected its own names, as in {quoted(classes[0])}"
        )
    same = {" ".join(name.lower().split()) for name in asked}
    if clashing := [word for word in words.competitors if " ".join(word.lower().split()) in same]:
        raise ValueError(
            f"background.competitors has {quoted(clashing[0])}, which is a class of {where}: its pixels would be "
            "background; leave it out"
        )
