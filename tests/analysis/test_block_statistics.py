"""Statistics of every block, against an explicit softmax in PyTorch and a model that prefers nothing."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch

from seg4diff_jax.analysis.block_statistics import block_statistics, text_share, uniform_shares
from seg4diff_jax.analysis.token_groups import TokenGroups
from seg4diff_jax.models.conditioning import TextConditioning
from seg4diff_jax.models.kernels import Kernel
from seg4diff_jax.passes import NoisedImages
from tests.reference.attention import explicit_softmax
from tests.reference.largest_array import largest_array
from tests.reference.mmdit import SMALL, VARIANTS, equal_tail, make_inputs, make_pair, run_torch

IMAGE, TEXT = 48, 11
GROUPS = {"start": [0], "prompt": [1, 2, 3], "end": [4], "padding": [5, 6], "zeros": [7, 8, 9, 10]}
SHORTER = {"start": [0], "prompt": [], "end": [1], "padding": [2, 3, 4, 5, 6], "zeros": [7, 8, 9, 10]}
"""Text tokens of the first prompt's groups, and of the second's, which has no prompt tokens."""


def groups(equal: int = 1) -> TokenGroups:
    members = np.zeros((2, len(GROUPS), TEXT), np.float32)
    for prompt, own in enumerate((GROUPS, SHORTER)):
        for group, tokens in enumerate(own.values()):
            members[prompt, group, tokens] = 1
    cut = TEXT - equal
    counted = np.concatenate([members[..., :cut], members[..., cut:].sum(-1, keepdims=True)], axis=-1)
    return TokenGroups(counted, tuple(GROUPS))


def seen(inputs: dict) -> tuple[NoisedImages, TextConditioning]:
    """What the model sees as it is: images that are all noise of their own, at noise levels of the timesteps."""
    return NoisedImages(inputs["latents"], inputs["latents"], inputs["timesteps"] / 1000), inputs["conditioning"]


def expected_of(processor, prompt: int) -> dict[str, np.ndarray]:
    """One block's statistics of one prompt by their definitions, token by token."""
    own = (GROUPS, SHORTER)[prompt]
    places = [np.arange(IMAGE), *(IMAGE + np.array(tokens, int) for tokens in own.values())]
    probs = processor.probs[prompt].numpy().astype(np.float64)
    q, k, v = (getattr(processor, name)[prompt].numpy().astype(np.float64) for name in "qkv")  # [heads, tokens, dim]
    mean = lambda x, axis: x.mean(axis=axis) if x.shape[axis] else np.full(np.delete(x.shape, axis), np.nan)
    shares = [[mean(probs[:, rows][:, :, columns].sum(-1), 1) for columns in places] for rows in places]
    directions = []
    for x in (q, k, v):
        flat = x.transpose(1, 0, 2).reshape(x.shape[1], -1)
        directions.append(flat / np.linalg.norm(flat, axis=-1, keepdims=True))
    cosine = lambda x, a, b: np.mean(x[a] @ x[b].T) if len(a) and len(b) else np.nan
    return {
        "shares": np.moveaxis(np.array(shares), 2, 0),
        "value_norms": np.stack([mean(np.linalg.norm(v[:, rows], axis=-1), 1) for rows in places], axis=-1),
        "whole_value_norms": np.array([mean(np.linalg.norm(v[:, rows], axis=(0, 2)), 0) for rows in places]),
        "similarity": np.array([[[cosine(x, a, b) for b in places] for a in places] for x in directions]),
    }


@pytest.mark.parametrize("variant", ["sd3", "sd3.5-medium"])
def test_statistics_of_every_block_are_those_of_the_explicit_softmax(variant):
    theirs, ours = make_pair(VARIANTS[variant])
    full, once = equal_tail(make_inputs(VARIANTS[variant], (12, 16), text=TEXT), 4)
    processors = explicit_softmax(theirs)
    with torch.no_grad():
        run_torch(theirs, full)
    for inputs, equal in ((full, 1), (once, 4)):
        found = block_statistics(ours, *seen(inputs), groups(equal))
        for prompt in range(2):
            for block, processor in enumerate(processors):
                for name, expected in expected_of(processor, prompt).items():
                    own = np.asarray(getattr(found, name))[prompt, block]
                    np.testing.assert_allclose(own, expected, rtol=1e-4, atol=2e-6, err_msg=f"{name} of {block}")
    assert np.ptp(text_share(np.asarray(found.shares))) > 0.05


def test_the_shares_of_a_query_sum_to_one_and_some_blocks_may_be_asked():
    _, ours = make_pair(SMALL)
    inputs = make_inputs(SMALL, (12, 16), text=TEXT)
    whole = block_statistics(ours, *seen(inputs), groups())
    np.testing.assert_allclose(np.asarray(whole.shares)[0].sum(-1), 1, atol=1e-6)
    some = block_statistics(ours, *seen(inputs), groups(), blocks=(0, 2))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b[:, [0, 2]], rtol=1e-5, atol=1e-6), some, whole)


def test_a_model_without_preference_has_the_uniform_shares():
    _, ours = make_pair(SMALL)
    for stack in ours.stacks:
        for stream in (stack.image, stack.text):
            stream.attention.q.kernel.set_value(jnp.zeros_like(stream.attention.q.kernel.get_value()))
            stream.attention.q.bias.set_value(jnp.zeros_like(stream.attention.q.bias.get_value()))
    inputs = make_inputs(SMALL, (12, 16), text=TEXT)
    shares = np.asarray(block_statistics(ours, *seen(inputs), groups()).shares)
    uniform = uniform_shares(groups().sizes(IMAGE))
    np.testing.assert_allclose(
        shares[:, :, :, 0], np.broadcast_to(uniform[:, None, None], shares[:, :, :, 0].shape), rtol=1e-5
    )
    np.testing.assert_allclose(text_share(shares)[:, :, 0], TEXT / (IMAGE + TEXT), rtol=1e-5)


def test_groups_of_another_text_are_refused():
    _, ours = make_pair(SMALL)
    with pytest.raises(ValueError, match="groups are of 11 tokens; this text has 12"):
        block_statistics(ours, *seen(make_inputs(SMALL, (12, 16), text=12)), groups())


def test_statistics_cost_no_array_of_tokens_by_tokens():
    _, ours = make_pair(SMALL | {"pos_embed_max_size": 32})
    inputs = make_inputs(SMALL, (64, 64), text=TEXT)
    tokens = 32 * 32 + TEXT
    statistics = functools.partial(block_statistics, kernel=Kernel("xla", query_chunk=64))
    assert largest_array(statistics, ours, *seen(inputs), groups()) < tokens * tokens
