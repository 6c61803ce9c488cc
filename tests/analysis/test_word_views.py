"""Maps of one word from several sides, against the records that they are of, on an image and while generating."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from seg4diff_jax.analysis.generating_records import generating_records
from seg4diff_jax.analysis.principal_components import ComponentsReader
from seg4diff_jax.analysis.word_views import (
    BOTH_WAYS,
    HEADS_AVERAGED,
    HEADS_KEPT,
    both_directions,
    by_blocks,
    by_heads,
    by_levels,
    of_pads,
    seen_in_image,
    seen_while_generating,
)
from seg4diff_jax.models.attention import AttentionRequest
from seg4diff_jax.sampling import Looking, sample_looking
from tests.reference.damage import with_damaged_autoencoder
from tests.reference.inputs import SQUARE, an_image

IMAGE, PROMPT, WORD, BLOCK = an_image(SQUARE, SQUARE), "a cat by the sea", "the sea", 2
OPTIONS: dict[str, Any] = {"steps": 4, "size": (32, 48), "seed": 3, "guidance": 4.0}


@pytest.fixture(scope="module")
def records(sd3) -> dict:
    request = AttentionRequest(("image_to_text", "text_to_image"))
    return sd3.attention(IMAGE, PROMPT, step=5, seed=3, request=request)


def seen(pipe, request=HEADS_AVERAGED, levels=(5,), prompt=PROMPT):
    blocks = range(pipe.transformer.depth)
    return seen_in_image(pipe, IMAGE, prompt, request, blocks=blocks, levels=levels, seed=3)


def test_heads_follow_their_mean_which_is_the_words_map(sd3, records):
    mean, *heads = by_heads(seen(sd3, HEADS_KEPT).records[BLOCK], WORD)
    np.testing.assert_allclose(mean.map, records[BLOCK].of(WORD), atol=1e-6)
    assert [view.title for view in heads] == [f"head {i}" for i in range(sd3.transformer.config.num_attention_heads)]
    columns = records[BLOCK].columns(WORD)
    for head, view in enumerate(heads):
        own = np.asarray(records[BLOCK].probs)[0, head][:, columns].mean(axis=-1)
        np.testing.assert_allclose(view.map.ravel(), own, atol=1e-6)


def test_blocks_and_levels_are_the_records_of_their_own_passes(sd3, records):
    both, depth = seen(sd3, levels=(28, 5)), sd3.transformer.depth
    np.testing.assert_array_equal(both.picture, IMAGE)
    for block, view in enumerate(by_blocks(both.levels[5], WORD)):
        np.testing.assert_allclose(view.map, records[block].of(WORD), atol=1e-6)
    views = by_levels(both.levels, WORD)
    assert [view.title for view in views][:: depth - 1][:2] == ["level 28, block 0", f"level 28, block {depth - 1}"]
    for block, view in enumerate(views[depth:]):
        assert view.title == f"level 5, block {block}"
        np.testing.assert_allclose(view.map, records[block].of(WORD), atol=1e-6)
    assert np.abs(views[0].map - views[depth].map).max() > 1e-6


def test_both_directions_are_of_the_same_tokens(sd3, records):
    views = both_directions(seen(sd3, BOTH_WAYS).records, WORD)
    for block, record in records.items():
        to_word, from_word = views[2 * block : 2 * block + 2]
        np.testing.assert_allclose(to_word.map, record.of(WORD), atol=1e-6)
        own = np.asarray(record.text_to_image.probs)[0][:, record.columns(WORD)].mean(axis=(0, 1))
        np.testing.assert_allclose(from_word.map.ravel(), own, atol=1e-6)


def test_pads_are_all_tokens_of_an_empty_prompt(sd3):
    views = of_pads(seen(sd3, prompt="").records[BLOCK])
    record = sd3.attention(IMAGE, "", blocks=BLOCK, step=5, seed=3)[BLOCK]
    assert [view.title for view in views][:3] == ["start", "end", "pad 1"]
    assert len(views) == 77
    assert views[-1].title == "pad 75"
    own = np.asarray(record.probs)[0].mean(axis=0).T
    np.testing.assert_allclose(np.stack([view.map.ravel() for view in views]), own, atol=1e-6)
    assert record.pads.tolist() == list(range(2, 77))


# ---- while generating -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("prompt", [PROMPT, ""])
def test_a_generating_run_is_seen_with_its_own_picture_and_the_records_of_its_steps(sd3, prompt):
    found = seen_while_generating(sd3, prompt, HEADS_KEPT, blocks=(1, BLOCK), levels=(3, 1), **OPTIONS)
    assert np.abs(found.picture.astype(int) - sd3.generate(prompt, **OPTIONS)).max() <= 1
    assert [*found.levels] == [3, 1]
    looking = Looking((1, BLOCK), (1, 3))  # of 4 steps, counted from the first
    _, own = sample_looking(sd3.transformer, sd3.generating_run([prompt], **OPTIONS), HEADS_KEPT, looking=looking)
    for place, level in enumerate((3, 1)):
        for block in looking.blocks:
            record = found.levels[level][block]
            np.testing.assert_allclose(record.probs, own[block].probs[place], atol=1e-6)
            assert record.grid == (2, 3)
            assert record.prompt == prompt
    if prompt:
        mean, *_ = by_heads(found.records[BLOCK], WORD)
        np.testing.assert_allclose(mean.map, found.levels[3][BLOCK].of(WORD), atol=1e-6)


def test_components_are_read_in_the_run_too(sd3):
    found = generating_records(sd3, PROMPT, ComponentsReader(), blocks=(1,), levels=(2,), **OPTIONS)
    assert found.levels[2][1].scores.shape == (1, 3, 6, 3)
    assert found.grid == (2, 3)


# ---- what is wrong --------------------------------------------------------------------------------------------------


def test_a_word_that_the_prompt_lacks_and_maps_that_are_not_finite_are_refused(sd3):
    with pytest.raises(ValueError, match="has no 'dog': its words are a, cat, by, the, sea"):
        by_heads(seen(sd3, HEADS_KEPT).records[BLOCK], "dog")
    with pytest.raises(FloatingPointError, match="attention of block 0 is not finite"):
        seen(with_damaged_autoencoder(sd3))
    with pytest.raises(ValueError, match=r"step 5 is not of this run of 4: expected 1 \(the last\) to 4"):
        seen_while_generating(sd3, PROMPT, HEADS_KEPT, blocks=(1,), levels=(5,), **OPTIONS)
