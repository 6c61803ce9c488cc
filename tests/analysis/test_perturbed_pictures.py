"""Pictures with one block perturbed at a time are those of separate runs, and one program makes them all."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

import seg4diff_jax as s4d
from seg4diff_jax.analysis.perturbed_pictures import Variant, perturbed_pictures, variants
from seg4diff_jax.models.perturbation import Blur, Perturbation
from seg4diff_jax.sampling import sample_latents

SIZE = 64, 80
PROMPTS = ["a photo of a cat on the grass", "two red buses"]
OPTIONS: dict[str, Any] = {"steps": 3, "guidance": 4.0, "size": SIZE}
BLUR = Blur(60.0, 151, text_tokens=(0, None))  # over nearly all of the text: small random weights look at all of it
SEEDS = (5, 2)
FIRST = 3


def alone(pipe: s4d.Pipeline, row: Variant, perturb: Perturbation, scale: float | None) -> np.ndarray:
    """The picture of a run of its own."""
    noise = np.asarray(pipe.view.noise(None, [row.place], 1, SIZE, row.seed))[0]
    perturbed: Any = {}
    if row.block is not None:
        own = Perturbation((row.block,), perturb.change, perturb.steps, perturb.half)
        perturbed = {"perturb": own, "perturbed_guidance": scale}
    return pipe.generate(PROMPTS[row.place - FIRST], noise=noise, **OPTIONS, **perturbed)


@pytest.mark.parametrize(
    ("perturb", "scale"),
    [
        (Perturbation((0,), BLUR), None),
        (Perturbation((0, 2), "skip", steps=(3, 1), half="prompt"), None),
        (Perturbation((0, 2), BLUR), 40.0),
        (Perturbation((2,), "skip", steps=(2,)), 3.0),
    ],
)
def test_rows_of_a_mixed_batch_are_runs_of_their_own_and_one_program_makes_them(sd3, perturb, scale):
    programs = sample_latents._cache_size()
    made = list(perturbed_pictures(sd3, PROMPTS, perturb, scale=scale, seeds=SEEDS, first=FIRST, batch=5, **OPTIONS))
    assert sample_latents._cache_size() == programs + 1
    assert [row for row, _ in made] == variants(len(PROMPTS), SEEDS, perturb.blocks, first=FIRST)
    plain: dict[tuple[int, int], np.ndarray] = {}
    for row, picture in made:
        assert np.abs(alone(sd3, row, perturb, scale).astype(int) - picture).max() <= 1, row
        if row.block is None:
            plain[row[:2]] = picture
        else:
            assert np.abs(plain[row[:2]].astype(int) - picture).max() > 2, f"{row} is perturbed"


def test_what_is_left_of_a_run_is_what_the_whole_run_makes(sd3):
    """The same rows share a batch, so not even the last digits differ. Batches that are done are not made."""
    perturb = Perturbation((1, 2, 3), BLUR)
    make = lambda **how: list(perturbed_pictures(sd3, PROMPTS, perturb, batch=3, **how, **OPTIONS))
    whole = make()
    done = {row for row, _ in whole[:4]}
    left = make(done=done)
    assert [row for row, _ in left] == [row for row, _ in whole[4:]]
    for (_, expected), (_, found) in zip(whole[4:], left, strict=True):
        np.testing.assert_array_equal(found, expected)
    assert make(done=[row for row, _ in whole]) == []


@pytest.mark.parametrize(
    ("prompts", "perturb", "how", "message"),
    [
        ([], Perturbation((1,)), {}, "0 prompts, 1 seeds and batches of 4; expected at least one of each"),
        (PROMPTS, Perturbation((1,)), {"seeds": ()}, "2 prompts, 0 seeds"),
        (PROMPTS, Perturbation((1,)), {"batch": 0}, "batches of 0"),
        (PROMPTS, Perturbation((1,), Blur(0.0)), {}, "a blur of sigma 0 or of one tap changes nothing"),
        (PROMPTS, Perturbation((9,)), {}, r"cannot perturb block 9: the model holds blocks 0\.\.5"),
        (PROMPTS, Perturbation((1,), steps=(9,)), {}, "cannot perturb step 9"),
        (PROMPTS, Perturbation((1,), half="prompt"), {"scale": 2.0}, "half is 'prompt'"),
    ],
)
def test_what_cannot_be_perturbed_is_refused(sd3, prompts, perturb, how, message):
    with pytest.raises(ValueError, match=message):
        list(perturbed_pictures(sd3, prompts, perturb, **how, **OPTIONS))
