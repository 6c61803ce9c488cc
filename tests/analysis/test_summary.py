"""Means and spreads of statistics over samples, against NumPy on the samples themselves."""

from __future__ import annotations

import numpy as np
import pytest

from seg4diff_jax.analysis.block_statistics import BlockStatistics
from seg4diff_jax.analysis.prompt_statistics import PromptStatistics
from seg4diff_jax.analysis.summary import summarize

GROUPS = "image", "clip start", "clip prompt", "clip end", "clip padding"
BLOCKS, HEADS = 3, 2


def drawn(sizes: list[list[int]], seed: int = 0) -> PromptStatistics:
    """Random statistics of prompts whose groups have these sizes; those of empty groups are NaN, as they are found."""
    rng, count, groups = np.random.default_rng(seed), len(sizes), len(GROUPS)
    whole = np.array(sizes, float)
    shares = rng.uniform(0.1, 1, (count, BLOCKS, HEADS, groups, groups)) * (whole > 0)[:, None, None, None]
    shares /= shares.sum(axis=-1, keepdims=True)
    absent = np.where(whole > 0, 1, np.nan)
    shares *= absent[:, None, None, :, None]
    norms = rng.uniform(1, 9, (count, BLOCKS, HEADS, groups)) * absent[:, None, None]
    totals = rng.uniform(1, 9, (count, BLOCKS, groups)) * absent[:, None]
    similarity = rng.uniform(-1, 1, (count, BLOCKS, 3, groups, groups)) * absent[:, None, None, :, None]
    prompts = tuple(map(str, range(count)))
    return PromptStatistics(prompts, GROUPS, whole, BlockStatistics(shares, norms, totals, similarity))


def weighted(values: np.ndarray, sizes: list[list[int]]) -> np.ndarray:
    """Mean over the text's groups, by their numbers of tokens; `values` is [prompts, blocks, text groups]."""
    return np.stack([np.average(own, axis=-1, weights=size[1:]) for own, size in zip(values, sizes, strict=True)])


def test_quantities_are_means_over_tokens_heads_and_samples():
    sizes = [[64, 1, 3, 1, 5], [64, 1, 6, 1, 2]]
    found = drawn(sizes)
    summary = summarize([found])
    shares = np.asarray(found.blocks.shares)
    for name, samples in {
        "image to text": shares[..., 0, 1:].sum(-1).mean(2),
        "image to words": shares[..., 0, 2].mean(2),
        "image to clip padding": shares[..., 0, 4].mean(2),
        "text to image": weighted(shares[..., 1:, 0].mean(axis=2), sizes),
        "norm of text": weighted(np.asarray(found.blocks.whole_value_norms)[..., 1:], sizes),
        "norm of image": found.blocks.whole_value_norms[..., 0],
        "values: similarity of image and words": found.blocks.similarity[:, :, 2, 0, 2],
    }.items():
        np.testing.assert_allclose(summary.quantities[name].mean, samples.mean(axis=0), rtol=1e-6)
        np.testing.assert_allclose(summary.quantities[name].deviation, samples.std(axis=0, ddof=1), rtol=1e-6)
    np.testing.assert_allclose(summary.text_shares, shares[..., 0, 1:].sum(-1).mean(0), rtol=1e-6)
    assert summary.uniform == pytest.approx(10 / 74)


def test_samples_of_several_batches_count_alike_and_one_has_no_deviation():
    one, two = drawn([[64, 1, 3, 1, 5]]), drawn([[64, 1, 6, 1, 2], [64, 1, 2, 1, 6]], seed=1)
    summary = summarize([one, two])
    samples = np.concatenate([each.text_shares.mean(axis=2) for each in (one, two)])
    np.testing.assert_allclose(summary.quantities["image to text"].mean, samples.mean(axis=0), rtol=1e-6)
    assert summary.samples == 3
    assert not summarize([one]).quantities["image to text"].deviation.any()


def test_prompts_without_words_have_no_share_on_words_and_no_norm_of_theirs():
    empty, spoken = drawn([[64, 1, 0, 1, 8]]), drawn([[64, 1, 3, 1, 5]], seed=1)
    summary = summarize([empty, spoken])
    np.testing.assert_allclose(
        summary.quantities["image to words"].mean, spoken.on("clip prompt")[0].mean(1), rtol=1e-6
    )
    alone = summarize([empty])
    assert np.isnan(alone.quantities["image to words"].mean).all()
    assert np.isnan(alone.quantities["norm of words"].mean).all()
    assert set(alone.candidates) == {"most on text", "largest text norm"}


def test_the_candidates_are_the_blocks_that_have_most():
    found = drawn([[64, 1, 3, 1, 5]])
    summary, shares = summarize([found]), np.asarray(found.blocks.shares)
    assert summary.candidates["most on text"] == np.argmin(shares[0, :, :, 0, 0].mean(1))
    assert summary.candidates["most on words"] == np.argmax(shares[0, :, :, 0, 2].mean(1))
    ratio = found.value_norms(*GROUPS[1:])[0] / found.value_norms("image")[0]
    assert summary.candidates["largest text norm"] == np.argmax(ratio)


def test_a_summary_of_nothing_is_refused():
    with pytest.raises(ValueError, match="there are no statistics: expected at least one prompt"):
        summarize([])
