"""Decoys: absent classes that an image is asked for, chosen by seed or by likeness."""

from __future__ import annotations

import numpy as np
import pytest

from seg4diff_jax.evaluation.batches import Example
from seg4diff_jax.evaluation.benchmarks import Benchmark
from seg4diff_jax.evaluation.decoys import cosines, lookalikes, random_decoys
from seg4diff_jax.evaluation.options import Decoys
from seg4diff_jax.evaluation.vocabulary import questions

NAMES = ("cat", "dog", "sofa", "chair", "sky", "grass")


def an_example(present: tuple[int, ...], index: int = 0) -> Example:
    labels = np.zeros((1, 1), np.uint8)
    return Example(index, "a", np.zeros((1, 1, 3), np.float32), labels, np.zeros(len(NAMES), np.int64), present)


def likeness_of(*alike: tuple[int, int]) -> np.ndarray:
    found = np.eye(len(NAMES))
    for place, (one, other) in enumerate(alike):
        found[one, other] = found[other, one] = 0.9 - 0.1 * place
    return found


def test_random_decoys_are_absent_and_the_same_for_an_image_whenever_it_is_asked():
    allowed, present = range(1, 40), (3, 5, 8)
    choose = random_decoys(allowed, 6, 0)
    found = {index: choose(present, index) for index in range(50)}
    for decoys in found.values():
        assert len(set(decoys)) == 6
        assert set(decoys) <= set(allowed) - set(present)
        assert list(decoys) == sorted(decoys)
    assert {index: random_decoys(allowed, 6, 0)(present, index) for index in reversed(range(50))} == found
    assert len(set(found.values())) > 40
    assert random_decoys(allowed, 6, 1)(present, 0) != found[0]


def test_every_absent_class_is_drawn_as_often():
    choose = random_decoys(range(8), 2, 0)
    drawn = np.bincount([label for index in range(1200) for label in choose((0, 7), index)], minlength=8)
    assert drawn[[0, 7]].tolist() == [0, 0]
    assert np.abs(drawn[1:7] - 400).max() < 80, "five standard deviations"


def test_lookalikes_are_most_like_one_of_the_classes_that_are_there():
    likeness = likeness_of((0, 1), (2, 3), (4, 5))
    choose = lookalikes(range(len(NAMES)), 2, likeness)
    assert choose((0, 2, 4), 9) == (1, 3)
    assert choose((4,), 9) == (0, 5), "of equals the earlier"
    assert lookalikes((0, 3, 4), 2, likeness)((0, 2, 4), 9) == (3,), "prompts may not name the others"
    assert choose((), 9) == ()


def test_an_image_with_few_absent_classes_has_few_decoys():
    assert random_decoys(range(4), 6, 0)((0, 1, 3), 5) == (2,)
    assert lookalikes(range(4), 6, np.eye(4))((0, 1, 2, 3), 5) == ()


def test_likeness_is_the_cosine_whatever_the_length():
    draw = np.random.default_rng(0).normal(size=(4, 7))
    expected = np.corrcoef(draw - draw.mean(axis=1, keepdims=True))
    np.testing.assert_allclose(cosines(9 * (draw - draw.mean(axis=1, keepdims=True))), expected, atol=1e-12)


def test_prompts_name_what_is_there_and_the_decoys_in_the_order_of_classes(sd3):
    benchmark, likeness = Benchmark("set", NAMES, []), likeness_of((0, 1), (4, 5))
    given = {"decoys": Decoys(count=2), "likeness": lambda names: likeness}
    asked = questions(benchmark, sd3.tokenizers, ("decoys", "lookalikes"), **given)
    classes, prompts = asked["lookalikes"](an_example((0, 4)))
    assert (classes, prompts.prompts) == ((0, 1, 4, 5), ("cat dog sky grass",))
    for index in range(5):
        classes, prompts = asked["decoys"](an_example((0, 4), index))
        beside = random_decoys(range(len(NAMES)), 2, 0)((0, 4), index)
        assert classes == tuple(sorted((0, 4, *beside)))
        assert prompts.classes == tuple(NAMES[label] for label in classes)


@pytest.mark.parametrize("kind", ["decoys", "lookalikes"])
def test_a_background_that_is_ignored_is_no_decoy(sd3, kind):
    benchmark = Benchmark("set", NAMES, [], background=1, rule="ignored")
    given = {"decoys": Decoys(count=9), "likeness": lambda names: likeness_of((0, 1))}
    classes, _ = questions(benchmark, sd3.tokenizers, (kind,), **given)[kind](an_example((0,)))
    assert classes == (0, 2, 3, 4, 5)
