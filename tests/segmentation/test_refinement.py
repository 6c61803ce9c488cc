"""Refinement by image-to-image attention, compared with an explicit softmax in PyTorch; its memory."""

from __future__ import annotations

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch

from seg4diff_jax.models.kernels import Kernel
from seg4diff_jax.segmentation.refinement import refined
from tests.reference.largest_array import largest_array
from tests.reference.random_weights import relative_error

ROWS, CLASSES, TOKENS, HEADS, WIDTH = 2, 5, 96, 3, 16
SHARPNESS = 3.0


def inputs(tokens: int = TOKENS) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    rng = np.random.default_rng(0)
    maps = (
        rng.random((ROWS, CLASSES, tokens)).astype(np.float32) * np.logspace(-6, 0, CLASSES, dtype=np.float32)[:, None]
    )
    q, k = (rng.standard_normal((ROWS, tokens, HEADS, WIDTH)).astype(np.float32) for _ in range(2))
    return maps, q, k


def in_torch(maps: np.ndarray, q: np.ndarray, k: np.ndarray, heads: list[int]) -> torch.Tensor:
    queries, keys = (torch.from_numpy(x)[:, :, heads].double().transpose(1, 2) for x in (q, k))
    weights = torch.softmax(SHARPNESS * queries @ keys.transpose(-1, -2) / WIDTH**0.5, dim=-1)
    return torch.einsum("rhij,rcj->rci", weights, torch.from_numpy(maps).double()) / len(heads)


@pytest.mark.parametrize("heads", [None, (2,), (0, 2)], ids=["all", "one", "two"])
def test_it_is_the_softmax_over_image_tokens_of_sharpened_scores(heads):
    maps, q, k = inputs()
    found = refined(jnp.asarray(maps), jnp.asarray(q), jnp.asarray(k), sharpness=SHARPNESS, heads=heads)
    expected = in_torch(maps, q, k, list(heads or range(HEADS)))
    for number in range(CLASSES):  # also of maps a million times smaller than others
        assert relative_error(np.asarray(found)[:, number], expected[:, number].numpy()) < 1e-5


def test_gradients_are_torchs():
    maps, q, k = inputs()
    weigh = np.random.default_rng(1).standard_normal(maps.shape).astype(np.float32)
    ours = lambda *given: (refined(*given, sharpness=SHARPNESS) * weigh).sum()
    found = jax.grad(ours, argnums=(0, 1, 2))(*map(jnp.asarray, (maps, q, k)))
    given = [torch.from_numpy(x).double().requires_grad_() for x in (maps, q, k)]
    queries, keys = (x.transpose(1, 2) for x in given[1:])
    weights = torch.softmax(SHARPNESS * queries @ keys.transpose(-1, -2) / WIDTH**0.5, dim=-1)
    (torch.einsum("rhij,rcj->rci", weights, given[0]) / HEADS * torch.from_numpy(weigh)).sum().backward()
    for mine, other in zip(found, given, strict=True):
        assert other.grad is not None
        assert relative_error(np.asarray(mine), other.grad.numpy()) < 1e-4


def test_a_fused_kernel_takes_more_maps_than_a_head_is_wide():
    rng = np.random.default_rng(0)
    maps = rng.random((1, 20, 128)).astype(np.float32)
    q, k = (rng.standard_normal((1, 128, 2, WIDTH)).astype(np.float32) for _ in range(2))
    fused = refined(*map(jnp.asarray, (maps, q, k)), sharpness=1.0, kernel=Kernel("splash", interpret=True))
    plain = refined(*map(jnp.asarray, (maps, q, k)), sharpness=1.0, kernel=Kernel("xla"))
    assert fused.shape == maps.shape
    assert relative_error(np.asarray(fused), np.asarray(plain)) < 1e-4


def test_a_constant_map_and_one_of_zeros_stay_as_they_are():
    maps, q, k = inputs()
    maps[:, 0], maps[:, 1] = 0.25, 0.0
    found = np.asarray(refined(*map(jnp.asarray, (maps, q, k)), sharpness=SHARPNESS))
    np.testing.assert_allclose(found[:, 0], 0.25, rtol=1e-5)
    np.testing.assert_array_equal(found[:, 1], 0)


def test_no_array_of_tokens_times_tokens_is_made():
    tokens = 2048
    shapes = [jax.ShapeDtypeStruct(x.shape, x.dtype) for x in inputs(tokens)]
    run = partial(refined, sharpness=SHARPNESS, kernel=Kernel("xla", query_chunk=64))
    assert largest_array(run, *shapes) < HEADS * tokens * tokens / 8
