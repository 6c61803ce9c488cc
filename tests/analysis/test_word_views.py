"""Maps of one word from several sides, against the records that they are of."""

from __future__ import annotations

import numpy as np
import pytest

from seg4diff_jax.analysis.word_views import Seen, both_directions, by_blocks, by_heads, by_levels, of_pads
from seg4diff_jax.models.attention import AttentionRequest
from tests.reference.damage import with_damaged_autoencoder
from tests.reference.inputs import SQUARE, an_image

IMAGE, PROMPT, BLOCK = an_image(SQUARE, SQUARE), "a cat by the sea", 2
SEEN = Seen(IMAGE, PROMPT, "the sea", step=5, seed=3)


@pytest.fixture(scope="module")
def records(sd3) -> dict:
    request = AttentionRequest(("image_to_text", "text_to_image"))
    return sd3.attention(IMAGE, PROMPT, step=5, seed=3, request=request)


def test_heads_follow_their_mean_which_is_the_words_map(sd3, records):
    mean, *heads = by_heads(sd3, SEEN, BLOCK)
    np.testing.assert_allclose(mean.map, records[BLOCK].of("the sea"), atol=1e-6)
    assert [view.title for view in heads] == [f"head {i}" for i in range(sd3.transformer.config.num_attention_heads)]
    columns = records[BLOCK].columns("the sea")
    for head, view in enumerate(heads):
        own = np.asarray(records[BLOCK].probs)[0, head][:, columns].mean(axis=-1)
        np.testing.assert_allclose(view.map.ravel(), own, atol=1e-6)


def test_blocks_and_levels_are_the_records_of_their_own_passes(sd3, records):
    for block, view in enumerate(by_blocks(sd3, SEEN)):
        np.testing.assert_allclose(view.map, records[block].of("the sea"), atol=1e-6)
    views = by_levels(sd3, SEEN, (28, 5))
    depth = sd3.transformer.depth
    assert [view.title for view in views][:: depth - 1][:2] == ["level 28, block 0", f"level 28, block {depth - 1}"]
    for block, view in enumerate(views[depth:]):
        assert view.title == f"level 5, block {block}"
        np.testing.assert_allclose(view.map, records[block].of("the sea"), atol=1e-6)
    assert np.abs(views[0].map - views[depth].map).max() > 1e-6


def test_both_directions_are_of_the_same_tokens(sd3, records):
    views = both_directions(sd3, SEEN)
    for block, record in records.items():
        to_word, from_word = views[2 * block : 2 * block + 2]
        np.testing.assert_allclose(to_word.map, record.of("the sea"), atol=1e-6)
        own = np.asarray(record.text_to_image.probs)[0][:, record.columns("the sea")].mean(axis=(0, 1))
        np.testing.assert_allclose(from_word.map.ravel(), own, atol=1e-6)


def test_pads_are_all_tokens_of_an_empty_prompt(sd3):
    views = of_pads(sd3, IMAGE, BLOCK, step=5, seed=3)
    record = sd3.attention(IMAGE, "", blocks=BLOCK, step=5, seed=3)[BLOCK]
    assert [view.title for view in views][:3] == ["start", "end", "pad 1"]
    assert len(views) == 77
    assert views[-1].title == "pad 75"
    own = np.asarray(record.probs)[0].mean(axis=0).T
    np.testing.assert_allclose(np.stack([view.map.ravel() for view in views]), own, atol=1e-6)
    assert record.pads.tolist() == list(range(2, 77))


def test_a_word_that_the_prompt_lacks_and_maps_that_are_not_finite_are_refused(sd3):
    with pytest.raises(ValueError, match="has no 'dog': its words are a, cat, by, the, sea"):
        by_heads(sd3, SEEN._replace(word="dog"), BLOCK)
    with pytest.raises(FloatingPointError, match="attention of block 2 is not finite"):
        of_pads(with_damaged_autoencoder(sd3), IMAGE, BLOCK)
