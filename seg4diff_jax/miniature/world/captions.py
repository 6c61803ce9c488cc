"""Captions of the synthetic world: sentences of several forms that name all classes in the picture and no others."""

from __future__ import annotations

import re
from collections.abc import Sequence
from itertools import groupby
from typing import NamedTuple

from seg4diff_jax.miniature.world.draws import Draws
from seg4diff_jax.miniature.world.palettes import COLORS

BARE_SHARE = 0.2
"""Share of captions that are class names alone, in random order, joined by spaces, like a prompt for masks."""

PLURALS = {
    "ball": "balls",
    "box": "boxes",
    "cone": "cones",
    "cookie": "cookies",
    "cross": "crosses",
    "egg": "eggs",
    "fish": "fishes",
    "heart": "hearts",
    "leaf": "leaves",
    "moon": "moons",
    "ring": "rings",
    "star": "stars",
    "target": "targets",
    "wheel": "wheels",
}
SIZES = ("small", "large")
NUMBERS = ("two", "three", "four")
ARTICLES = {"a": 6.0, "the": 1.5, "one": 1.0, "": 1.5}
ACROSS = ("on the left", "in the middle", "on the right")
DOWN = ("at the top", "in the middle", "at the bottom")
MEDIA = ("a picture of", "a photo of", "a drawing of", "an image of", "a scene with", "there is")
ON = ("on", "over", "on top of", "in front of", "against")
UNDER = ("under", "behind", "with", "below")
BACKDROP = ("{things}, {stuffs} behind", "{things}, and behind it {stuffs}", "background of {stuffs}, {things}")
ONE_ABOVE_OTHER = ("{first} above {second}", "{second} below {first}", "{second} under {first}")
SIDE_BY_SIDE = ("{first} beside {second}", "{first} next to {second}", "{first} left of {second}")


class ThingSeen(NamedTuple):
    """One thing in a picture: its class, its two colours, "small", "large" or "", and its centre in 0..1."""

    name: str
    main: str
    second: str
    size: str
    x: float
    y: float


class StuffSeen(NamedTuple):
    name: str
    main: str


def caption(things: Sequence[ThingSeen], stuffs: Sequence[StuffSeen], upright: bool, draws: Draws) -> str:
    """Returns a random caption of a picture.

    Args:
      things: the things to name, at least one; several of one class share a plural.
      stuffs: one stuff, or two in the order of reading: the upper or the left one first.
      upright: whether the two stuffs lie one above the other.
    """
    by_class = lambda thing: thing.name
    groups = [list(group) for _, group in groupby(sorted(things, key=by_class), key=by_class)]
    if draws.chance(BARE_SHARE):
        return " ".join(draws.shuffled([group[0].name for group in groups] + [stuff.name for stuff in stuffs]))
    named = [_thing_phrase(group, draws) for group in draws.shuffled(groups)]
    grounds = [_stuff_phrase(stuff, draws) for stuff in stuffs]
    form = draws.weighted({"on": 4.0, "under": 2.0, "medium": 3.0, "list": 2.0, "backdrop": 1.5})
    if form == "list":
        return ", ".join(draws.shuffled(named + grounds))
    what, ground = _joined(named, draws), _grounds(grounds, upright, draws)
    if form == "under":
        return f"{ground} {draws.choice(UNDER)} {what}"
    if form == "backdrop":
        return draws.choice(BACKDROP).format(things=what, stuffs=ground)
    start = draws.choice(MEDIA) + " " if form == "medium" else ""
    return f"{start}{what} {draws.choice(ON)} {ground}"


def _thing_phrase(group: list[ThingSeen], draws: Draws) -> str:
    thing = group[0]
    if len(group) > 1:
        same = all(other.main == thing.main for other in group)
        color = thing.main if same and draws.chance(0.5) else ""
        return _spaced(draws.choice((NUMBERS[len(group) - 2], "")), color, PLURALS[thing.name])
    look = draws.weighted({"": 4.0, "color": 3.0, "size": 1.0, "both": 1.0, "two": 1.0})
    color = {"color": thing.main, "both": thing.main, "two": f"{thing.main} and {thing.second}"}.get(look, "")
    words = _spaced(thing.size if look in ("size", "both") else "", color, thing.name)
    article = draws.weighted(ARTICLES)
    article = "an" if article == "a" and words[0] in "aeiou" else article
    return _spaced(article, words, _place(thing, draws) if draws.chance(0.15) else "")


def _place(thing: ThingSeen, draws: Draws) -> str:
    third = lambda position: min(int(3 * position), 2)
    across, down = ACROSS[third(thing.x)], DOWN[third(thing.y)]
    middle = ACROSS[1]
    return draws.choice([place for place in (across, down) if place != middle] or [middle])


def _stuff_phrase(stuff: StuffSeen, draws: Draws) -> str:
    return _spaced("the" if draws.chance(0.15) else "", stuff.main if draws.chance(0.3) else "", stuff.name)


def _joined(phrases: Sequence[str], draws: Draws) -> str:
    if len(phrases) == 1:
        return phrases[0]
    start, last = draws.choice((", ", " and ")).join(phrases[:-1]), phrases[-1]
    return f"{start} {draws.choice(('and', 'and', 'with'))} {last}"


def _grounds(grounds: Sequence[str], upright: bool, draws: Draws) -> str:
    if len(grounds) == 1:
        return grounds[0]
    if draws.chance(0.5):
        return " and ".join(draws.shuffled(grounds))
    return draws.choice(ONE_ABOVE_OTHER if upright else SIDE_BY_SIDE).format(first=grounds[0], second=grounds[1])


def _spaced(*words: str) -> str:
    return " ".join(word for word in words if word)


def words(names: Sequence[str]) -> tuple[str, ...]:
    """Returns every word and mark that a caption may contain, each once: the class names first, then the rest."""
    forms = (*MEDIA, *ON, *UNDER, *BACKDROP, *ONE_ABOVE_OTHER, *SIDE_BY_SIDE, *ACROSS, *DOWN, *ARTICLES)
    plain = re.sub(r"\{\w+\}", "", " ".join((*forms, "and with an ,")))
    every = [*names, *PLURALS.values(), *COLORS, *SIZES, *NUMBERS, *re.findall(r"\w+|,", plain)]
    return tuple(dict.fromkeys(every))
