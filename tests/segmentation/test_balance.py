"""Class maps made comparable, compared with plain loops."""

from __future__ import annotations

import jax.numpy as jnp
import numpy as np

from seg4diff_jax.segmentation.balance import balanced, normalized

PROMPTS, CLASSES, TOKENS, TEXT = 2, 3, 10, 7


def inputs() -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Maps, the probabilities that they are of, and the averaging: class 2 is not named by the second prompt."""
    rng = np.random.default_rng(0)
    probs = rng.random((PROMPTS, TOKENS, TEXT)).astype(np.float32)
    averaging = np.zeros((PROMPTS, CLASSES, TEXT), np.float32)
    averaging[:, 0, 1], averaging[:, 1, 2:4], averaging[0, 2, 4] = 1, 0.5, 1
    return np.einsum("pit,pct->pci", probs, averaging), probs, averaging


def test_content_is_each_tokens_attention_in_parts_of_what_class_words_get():
    maps, probs, averaging = inputs()
    found = np.asarray(normalized(jnp.asarray(maps), jnp.asarray(probs), jnp.asarray(averaging), "content"))
    for prompt, words in enumerate([(1, 2, 3, 4), (1, 2, 3)]):
        for token in range(TOKENS):
            whole = sum(probs[prompt, token, word] for word in words)
            np.testing.assert_allclose(found[prompt, :, token], maps[prompt, :, token] / whole, rtol=1e-5)


def test_minmax_brings_each_map_from_0_to_1_and_a_constant_one_to_0():
    maps, probs, averaging = inputs()
    found = np.asarray(normalized(jnp.asarray(maps), jnp.asarray(probs), jnp.asarray(averaging), "minmax"))
    np.testing.assert_array_equal(found[1, 2], 0)
    named = found[[0, 0, 0, 1, 1], [0, 1, 2, 0, 1]]
    np.testing.assert_array_equal(named.min(axis=-1), 0)
    np.testing.assert_array_equal(named.max(axis=-1), 1)
    np.testing.assert_array_equal(named.argsort(axis=-1), maps[[0, 0, 0, 1, 1], [0, 1, 2, 0, 1]].argsort(axis=-1))


def test_none_is_the_maps_themselves():
    maps, probs, averaging = map(jnp.asarray, inputs())
    np.testing.assert_array_equal(normalized(maps, probs, averaging, "none"), maps)
    np.testing.assert_array_equal(balanced(maps, 0.0), maps)


def test_balance_divides_by_a_power_of_the_mean():
    maps, _, _ = inputs()
    found = np.asarray(balanced(jnp.asarray(maps), 0.25))
    for prompt, number in np.ndindex(PROMPTS, CLASSES):
        own = maps[prompt, number]
        expected = own / own.mean() ** 0.25 if own.any() else own
        np.testing.assert_allclose(found[prompt, number], expected, rtol=1e-5)


def test_at_1_all_classes_have_equal_mass():
    maps, _, _ = inputs()
    means = np.asarray(balanced(jnp.asarray(maps), 1.0)).mean(axis=-1)
    np.testing.assert_allclose(means, [[1, 1, 1], [1, 1, 0]], rtol=1e-5)
