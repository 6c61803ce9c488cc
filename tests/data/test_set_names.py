"""How classes are called in prompts."""

from __future__ import annotations

import pytest

from seg4diff_jax.data.names import spelled
from seg4diff_jax.data.sets import SETS


@pytest.mark.parametrize("name", SETS)
def test_every_set_names_its_classes_apart_in_its_own_and_in_the_readable_spelling(name):
    published = SETS[name]
    assert spelled(published.classes, "own") == published.classes
    readable = spelled(published.classes, "readable")
    for names in (published.classes, readable):
        assert len(set(names)) == len(published.classes)
    assert not [word for word in readable if set(word) - set("abcdefghijklmnopqrstuvwxyz -") or word != word.strip()]
    assert set(published.ids.values()) <= {*range(len(published.classes)), 255}
    assert {*range(len(published.classes))} <= set(published.ids.values()), "every class has an id"


def test_readable_names_are_words_without_suffixes():
    names = (
        "diningtable",
        "tvmonitor",
        "building-other",
        "desk-stuff",
        "wall-brick",
        "floor-other-merged",
        "wall_clock",
    )
    expected = ("dining table", "tv monitor", "building", "desk", "brick wall", "floor", "wall clock")
    assert spelled(names, "readable") == expected
    assert spelled(("t-shirt", "-other"), "readable") == ("t-shirt", "-other")


def test_the_release_cuts_names_at_the_first_hyphen():
    names = ("wall-brick", "wall-wood", "diningtable", "floor-other-merged")
    assert spelled(names, "release") == ("wall", "wall", "diningtable", "floor")


def test_readable_names_that_cannot_be_told_apart_are_refused_with_both():
    with pytest.raises(ValueError, match="classes 'desk' and 'desk-stuff' would both be called 'desk'"):
        spelled(("desk", "desk-stuff"), "readable")
