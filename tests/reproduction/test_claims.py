"""Each finding holds by its rule alone: figures on one side of it, and on the other."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from seg4diff_jax.reproduction import attention_budget, components, expert, finetuning, masks, pads, perturbation
from seg4diff_jax.reproduction.parts import Part
from seg4diff_jax.reproduction.subject import Subject

BLOCKS, EXPERT = 6, 3


def subject() -> Subject:
    """As much of a subject as pages need."""
    pipe = SimpleNamespace(expert_step=8, expert_block=EXPERT, transformer=SimpleNamespace(depth=BLOCKS))
    made = object.__new__(Subject)
    for name, value in {"pipe": pipe, "prompts": ("a", "b", "c"), "seeds": (0, 1), "name": "none"}.items():
        object.__setattr__(made, name, value)
    return made


SUBJECT = subject()


def peak(at: int, height: float, base: float) -> list[float]:
    return [height if block == at else base for block in range(BLOCKS)]


def budget(text: float, image: float, at: int = EXPERT, words: float = 3.0, uniform: float = 0.1) -> dict[str, Any]:
    norms = {"image": [1.0] * BLOCKS, "text": peak(at, 2.0, 1.0), "words": peak(at, words, 1.0)}
    level = {"uniform": uniform, "text": [text] * BLOCKS, "words": peak(at, 0.3, 0.1)}
    return {"prompts": 3, "levels": {key: {**level, "image": [image] * BLOCKS, "norms": norms} for key in ("8", "28")}}


def rows(best: int, level: int = 8, head: float = 30.0, other: float = 5.0) -> dict[str, Any]:
    found = []
    for prompts in ("present", "all"):
        for step in (1, 8, 28):
            for block in range(BLOCKS):
                value = (40.0 if block == best else 10.0) + (5.0 if step == level else 0.0)
                each = {"prompts": prompts, "block": block, "level": step, "macc": 1.0, "pacc": 1.0}
                found.append({**each, "head": None, "miou": value})
                heads = head if block in (2, 3) else other
                found += [{**each, "head": number, "miou": heads} for number in range(2)]
    guessers = {"random": 15.0, "constant": 9.0}
    return {"images": 4, "data": "scenes", "levels": [1, 8, 28], "word": "cat", "rows": found, "guessers": guessers}


def perturbed(at: int, improvement: list[float], other: float = 0.9, prompts: int = 8) -> dict[str, Any]:
    """Scores whose differences between blocks are the same for each prompt, in which block `at` alone is blurred away.

    Guided away from the expert, pictures improve by so much, and from other blocks by ten times that.
    """
    blurred = np.tile([1.0, *peak(at, 0.5, other)], (prompts, 1)) + 0.001 * np.arange(prompts)[:, None]
    base = 0.8 + 0.01 * np.arange(prompts)
    gains = np.resize(improvement, prompts) / 100
    guided = base[:, None] + np.stack([(0 * gains)] + [gains if b == EXPERT else 10 * gains for b in range(BLOCKS)], 1)
    of_blur = np.concatenate([base[:, None], blurred[:, 1:] - 0.2], axis=1)
    scores = {
        "blurred": {"CLIP-I": blurred.tolist(), "CLIP-T": of_blur.tolist()},
        "guided": {"CLIP-I": blurred.tolist(), "CLIP-T": guided.tolist()},
    }
    return {"prompts": prompts, "scores": scores, "models": {"CLIP-I": "clip"}}


def verdicts(part: Part) -> list[str]:
    return [claim.verdict for claim in part.claims]


HOLDS, FAILS, OPEN = "holds", "does not hold", "not testable here"


@pytest.mark.parametrize(
    ("found", "expected"),
    [
        (budget(0.2, 0.3), [HOLDS] * 4),
        (budget(0.14, 0.6), [FAILS, FAILS, HOLDS, HOLDS]),
        (budget(0.2, 0.3, at=1), [HOLDS, HOLDS, FAILS, FAILS]),
        (budget(0.2, 0.3, words=1.5), [HOLDS, HOLDS, HOLDS, FAILS]),
        (budget(0.9, 0.3, uniform=0.8), [OPEN, HOLDS, HOLDS, HOLDS]),  # text cannot have 1.5 times its share
    ],
)
def test_attention_and_norms(found, expected):
    assert verdicts(attention_budget.present(SUBJECT, {"attention_budget": found})) == expected


@pytest.mark.parametrize(
    ("objects", "positions", "expected"),
    [
        (peak(EXPERT, 0.6, 0.2), [0.4] * BLOCKS, [HOLDS, HOLDS]),
        (peak(1, 0.6, 0.2), [0.1] * BLOCKS, [FAILS, FAILS]),
    ],
)
def test_components(objects, positions, expected):
    found = {"images": 4, "objects": objects, "positions": positions}
    none = {"images": 0, "objects": [], "positions": []}
    assert verdicts(components.present(SUBJECT, {"components": none})) == [OPEN]
    assert verdicts(components.present(SUBJECT, {"components": found})) == expected


@pytest.mark.parametrize(
    ("found", "expected"),
    [
        (rows(EXPERT), [HOLDS] * 5),
        (rows(0), [FAILS, FAILS, HOLDS, FAILS, HOLDS]),
        (rows(EXPERT, level=1), [HOLDS, HOLDS, HOLDS, HOLDS, FAILS]),
        (rows(EXPERT, head=50.0), [HOLDS, HOLDS, HOLDS, FAILS, HOLDS]),
        (rows(EXPERT, other=35.0), [HOLDS, HOLDS, FAILS, HOLDS, HOLDS]),
    ],
)
def test_masks(found, expected):
    assert verdicts(masks.present(SUBJECT, {"masks": found})) == expected


@pytest.mark.parametrize(
    ("found", "expected"),
    [
        (perturbed(EXPERT, [1.0, 1.2, 1.8]), [HOLDS, HOLDS, HOLDS]),
        (perturbed(EXPERT, [-1.0, -1.8, -0.2]), [HOLDS, HOLDS, FAILS]),
        (perturbed(2, [1.0, -0.9]), [FAILS, FAILS, OPEN]),
        (perturbed(EXPERT, [1.0, 1.2, 1.8], prompts=3), [OPEN, OPEN, OPEN]),
        (perturbed(EXPERT, [1.0, 1.2], other=0.5), [OPEN, OPEN, HOLDS]),
        ({"prompts": 3, "scores": {}, "models": {}}, [OPEN, OPEN, OPEN]),
    ],
)
def test_perturbation(found, expected):
    assert verdicts(perturbation.present(SUBJECT, {"perturbation": found})) == expected


def test_the_figures_of_a_claim_are_those_of_the_expert():
    """By which the expert is below the next lowest, and by which pictures guided away from it improve."""
    *lowest, improves = perturbation.present(SUBJECT, {"perturbation": perturbed(EXPERT, [1.0])}).claims
    assert ["+40.00, interval +40.00 to +40.00" in claim.found for claim in lowest] == [True, True]
    assert improves.found == "CLIP-T +1.00, interval +1.00 to +1.00"


@pytest.mark.parametrize(("miou", "expected"), [(40.0, HOLDS), (29.0, FAILS)])
def test_segments_without_names(miou, expected):
    found = {"images": 4, "miou": miou, "segments": 5.0, "guessers": {"one_segment": 20.0, "permuted": None}}
    assert verdicts(pads.present(SUBJECT, {"pads": found})) == [expected]


def test_the_ways_to_the_expert_are_each_the_best_block_by_their_own_measure():
    objects = {"images": 1, "objects": peak(4, 0.6, 0.2), "positions": [0.1] * BLOCKS}
    found = {
        "attention_budget": budget(0.2, 0.3, at=EXPERT),
        "components": objects,
        "masks": rows(EXPERT),
        "perturbation": perturbed(EXPERT, [1.0, 1.2]),
    }
    ways = expert.found_by(SUBJECT, found)
    assert ways == {
        "mIoU by labels": EXPERT,
        "most attention on text, level 8": 0,  # equal everywhere
        "most attention on the prompt's words, level 8": EXPERT,
        "largest text norm": EXPERT,
        "components by classes": 4,
        "CLIP-I lost": EXPERT,
    }
    assert verdicts(expert.present(SUBJECT, found)) == [HOLDS]
    assert verdicts(expert.present(SUBJECT, {**found, "perturbation": perturbed(1, [1.0, 1.2])})) == [FAILS]
    without = {"prompts": 3, "scores": {}, "models": {}}
    assert verdicts(expert.present(SUBJECT, {**found, "perturbation": without})) == [OPEN]


@pytest.mark.parametrize(
    ("shift", "cosines", "expected"),
    [
        ([1.0, 2.0], [1.0, 1.1, 0.9] * 3, [HOLDS, HOLDS, HOLDS]),
        ([-1.0, -2.0], [-1.0, -1.1, -0.9] * 3, [FAILS, FAILS, FAILS]),
        ([1.0, -2.0], [1.0, -1.0, 0.1] * 3, [OPEN, OPEN, OPEN]),
        ([1.0, 2.0], [1.0, 1.1, 0.9], [HOLDS, HOLDS, OPEN]),
    ],
)
def test_finetuning(shift, cosines, expected):
    before = {"miou": [60.0, 61.0], "unsupervised": [40.0, 41.0], "cosines": [25.0] * len(cosines)}
    after = {key: (np.array(before[key]) + shift).tolist() for key in ("miou", "unsupervised")}
    before, after = ({**each, "velocity_loss": [0.5]} for each in (before, after))
    after["cosines"] = (np.array(before["cosines"]) + cosines).tolist()
    found = {"adapters": "export", "trained": False, "without": before, "with": after}
    assert verdicts(finetuning.present(SUBJECT, {"finetuning": found})) == expected
    assert verdicts(finetuning.present(SUBJECT, {"finetuning": {"adapters": None}})) == [OPEN]
