"""Masks from a generating run are those of its own attention in one step, and change no picture."""

from __future__ import annotations

import dataclasses
import itertools
import warnings
from typing import Any

import jax
import jax.numpy as jnp
import jaxtyping
import numpy as np
import pytest
import torch
import torch.nn.functional as F

import seg4diff_jax as s4d
from seg4diff_jax import pipeline
from seg4diff_jax.flow import guided
from seg4diff_jax.generated_masks import mask_step
from seg4diff_jax.models.attention import AttentionRequest, ForwardOptions
from seg4diff_jax.passes import NoisedImages, attention, velocity
from seg4diff_jax.prompt_attention import prompt_attention
from tests.reference.inputs import VARIED
from tests.reference.ties import assert_same_labels

SIZE = 64, 80
PROMPTS = ["a photo of a cat on the grass, a cat", "two red buses"]
NAMES = [["a", "cat", "on", "the grass", "grass"], ["red buses", "two", "red"]]
STEPS = 5
OPTIONS: dict[str, Any] = {"steps": STEPS, "size": SIZE, "seed": 3}


def records_at(pipe: s4d.Pipeline, guidance: float, at_step: int, block: int) -> list[s4d.PromptAttention]:
    """The records of each prompt from a pass on the latents that a run has before that step."""
    run = pipe.generating_run(PROMPTS, guidance=guidance, **OPTIONS)
    levels, latents = np.asarray(run.sigmas), run.latents
    negative = run.guidance and jax.tree.map(lambda leaf: jnp.repeat(leaf, len(latents), axis=0), run.guidance[0])
    for sigma, following in itertools.pairwise(levels[: STEPS - at_step + 1]):
        seen = NoisedImages(latents, latents, sigma)
        found, _ = velocity(pipe.transformer, seen, run.texts)
        if run.guidance is not None:
            found = guided(found, velocity(pipe.transformer, seen, negative)[0], run.guidance[1])
        latents = latents + (following - sigma) * found
    request = AttentionRequest()
    seen = NoisedImages(latents, latents, levels[-at_step])
    records = attention(pipe.transformer, seen, run.texts, blocks=(block,), options=ForwardOptions(request))
    grid = SIZE[0] // 16, SIZE[1] // 16
    each = prompt_attention(records, dict(enumerate(PROMPTS)), run.texts, pipe.tokenizers, grid, request)
    return [each[place][block] for place in range(len(PROMPTS))]


def upsampled(scores: np.ndarray) -> np.ndarray:
    return F.interpolate(torch.from_numpy(scores)[None], SIZE, mode="bilinear")[0].argmax(0).numpy()


# ---- what they are --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("guidance", "at_step", "block"), [(1.0, STEPS, 0), (4.0, 2, 0), (4.0, 1, 1)])
def test_masks_are_those_of_the_attention_on_the_latents_of_that_step(sd3, guidance, at_step, block):
    found = sd3.generate(PROMPTS, segment=NAMES, block=block, at_step=at_step, guidance=guidance, **OPTIONS)
    expected = records_at(sd3, guidance, at_step, block)
    for prompt, names, record, (_, masks) in zip(PROMPTS, NAMES, expected, found, strict=True):
        scores = np.stack([record.of(name) for name in names])
        assert np.abs(masks.scores - scores).max() <= 1e-5 * scores.max()
        assert masks.labels.shape == SIZE
        assert_same_labels(masks.labels, upsampled(scores), scores)
        assert (masks.classes, masks.prompts) == (tuple(names), (prompt,))
    assert any(len(np.unique(masks.labels)) > 1 for _, masks in found)


@pytest.mark.parametrize("guidance", [1.0, 4.0])
def test_pictures_are_those_without_masks(sd3, guidance):
    alone = sd3.generate(PROMPTS, guidance=guidance, **OPTIONS)
    with_masks = sd3.generate(PROMPTS, segment=NAMES, block=VARIED, guidance=guidance, **OPTIONS)
    for expected, (picture, _) in zip(alone, with_masks, strict=True):
        assert np.abs(expected.astype(int) - picture).max() <= 1


def test_without_masks_nothing_is_read(sd3, monkeypatch):
    monkeypatch.setattr(pipeline, "pictures_with_masks", lambda *_: pytest.fail("attention was read"))
    assert sd3.generate("a cat", **OPTIONS).shape == (*SIZE, 3)


def test_one_prompt_is_one_pair_and_a_list_of_them_a_list(sd3):
    options = {**OPTIONS, "block": VARIED, "at_step": 2}
    picture, masks = sd3.generate(PROMPTS[0], segment=("cat", "grass"), **options)
    assert picture.shape == (*SIZE, 3)
    assert masks.labels.shape == SIZE
    ((again, same),) = sd3.generate(PROMPTS[:1], segment=["cat", "grass"], **options)
    np.testing.assert_array_equal(again, picture)
    np.testing.assert_array_equal(same.scores, masks.scores)
    assert sd3.generate([], segment=["cat"]) == []


def test_one_list_of_names_serves_all_prompts_and_each_of_their_pictures(sd3):
    prompts = ["a cat on the grass", "the grass, a cat"]
    options = {**OPTIONS, "block": VARIED, "images_per_prompt": 2}
    shared = sd3.generate(prompts, segment=["cat", "grass"], **options)
    listed = sd3.generate(prompts, segment=[["cat", "grass"]] * 2, **options)
    turned = sd3.generate(prompts, segment=[["cat", "grass"], ["grass", "cat"]], **options)
    assert [masks.prompts[0] for _, masks in shared] == [prompts[0]] * 2 + [prompts[1]] * 2
    for place, (_, masks) in enumerate(shared):
        np.testing.assert_array_equal(masks.scores, listed[place][1].scores)
        own = turned[place][1].scores
        np.testing.assert_array_equal(masks.scores, own if place < 2 else own[::-1])
    assert np.abs(shared[0][1].scores - shared[1][1].scores).max() > 0, "each picture has its own noise"
    assert len(sd3.generate(prompts[0], segment=["cat", "grass"], **options)) == 2


def test_block_and_step_are_the_checkpoints_own_by_default(sd3):
    knowing = dataclasses.replace(sd3, expert_block=VARIED, expert_step=12)
    _, found = knowing.generate("a cat", segment=["a", "cat"], **OPTIONS)
    _, expected = sd3.generate("a cat", segment=["a", "cat"], block=VARIED, at_step=2, **OPTIONS)
    np.testing.assert_array_equal(found.scores, expected.scores)


@pytest.mark.parametrize(("expert", "steps", "expected"), [(8, 28, 8), (8, 14, 4), (3, 4, 1), (28, 5, 5), (1, 1, 1)])
def test_the_default_step_is_as_far_along_the_run(expert, steps, expected):
    assert mask_step(None, expert, steps) == expected


def test_a_single_word_is_warned_of(sd3):
    with pytest.warns(s4d.OneClassWarning, match="'cat' is the only word, so every pixel"):
        _, masks = sd3.generate("a cat", segment=["cat"], block=1, **OPTIONS)
    assert not masks.labels.any()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        sd3.generate("a cat", segment=["a", "cat"], block=1, **OPTIONS)


# ---- what is wrong --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        (
            {"segment": ["dog"]},
            ValueError,
            "the prompt 'a cat on the grass' has no 'dog': its words are a, cat, on, the",
        ),
        ({"segment": ["on grass"]}, ValueError, "has no 'on grass'"),
        ({"segment": [""]}, ValueError, "expected a word of the prompt"),
        ({"segment": []}, ValueError, "the list of words of the prompt 'a cat on the grass' is empty"),
        ({"segment": ["cat", "Cat"]}, ValueError, "'Cat' is repeated in the list of words; give each once"),
        ({"segment": "cat"}, TypeError, r"found the string 'cat'; write \['cat'\]"),
        ({"segment": [["cat"]]}, TypeError, r"expected a list of words of the prompt .*, found \[\['cat'\]\]"),
        ({"at_step": 0}, ValueError, r"at_step is 0; expected a whole number, 1 \(the last step\) to 5 \(the first\)"),
        ({"at_step": 6}, ValueError, "at_step is 6; expected a whole number"),
        ({"at_step": 2.0}, ValueError, r"at_step is 2\.0; expected a whole number"),
        ({"block": 6}, ValueError, r"block is 6; the loaded transformer has blocks 0\.\.5"),
        ({"block": None}, ValueError, "does not say which block segments best: name one with block="),
        ({"segment": None}, ValueError, "block and at_step say where masks are read: name words of the prompt with"),
        ({"segment": None, "block": None, "at_step": 1}, ValueError, "block and at_step say where masks are read"),
    ],
)
def test_what_cannot_be_read_is_refused_before_the_run(sd3, options, error, message, monkeypatch):
    monkeypatch.setattr(jaxtyping.config, "jaxtyping_disable", True)  # as for users: types are checked in tests only
    given = {**OPTIONS, "segment": ["cat", "grass"], "block": 1, **options}
    with pytest.raises(error, match=message):
        sd3.generate("a cat on the grass", **given)


def test_each_prompt_has_a_list_that_fits_it(sd3):
    with pytest.raises(ValueError, match="2 prompts and 1 lists of class names; expected one for each"):
        sd3.generate(["a cat", "a dog"], segment=[["cat"]], block=1)
    with pytest.raises(ValueError, match="the prompt 'a dog' has no 'cat'"):
        sd3.generate(["a cat", "a dog"], segment=["a", "cat"], block=1)


def test_a_word_that_is_cut_off_has_no_mask(sd3):
    with pytest.warns(UserWarning, match="does not see"), pytest.raises(ValueError, match="'dog' of the prompt"):
        sd3.generate("a cat on grass " * 30 + "dog", segment=["cat", "dog"], block=1, **OPTIONS)


def test_a_transformer_without_its_last_blocks_makes_no_masks_either(sd3_checkpoint):
    with pytest.raises(ValueError, match=r"blocks 0\.\.1 of 0\.\.5 are loaded; pictures need all"):
        s4d.load(sd3_checkpoint, blocks=2).generate("a cat", segment=["a", "cat"], block=1)
