"""Attention on text, against an explicit softmax in PyTorch and a model that prefers nothing."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import torch
from diffusers import SD3Transformer2DModel

from seg4diff_jax.analysis.attention_share import text_shares, uniform_share
from seg4diff_jax.models.conditioning import TextConditioning
from seg4diff_jax.passes import NoisedImages
from tests.reference.attention import explicit_softmax
from tests.reference.mmdit import SMALL, equal_tail, make_inputs, make_pair, run_torch


def seen(inputs: dict) -> tuple[NoisedImages, TextConditioning]:
    """What the model sees as it is: images that are all noise of their own, at noise levels of the timesteps."""
    return NoisedImages(inputs["latents"], inputs["latents"], inputs["timesteps"] / 1000), inputs["conditioning"]


def test_shares_of_every_block_and_head_are_those_of_the_explicit_softmax():
    theirs, ours = make_pair(SMALL)
    assert isinstance(theirs, SD3Transformer2DModel)
    inputs = make_inputs(SMALL, (12, 16), text=11)
    full, once = equal_tail(inputs, 4)
    processors = explicit_softmax(theirs)
    with torch.no_grad():
        run_torch(theirs, full)
    expected = np.stack([p.probs[:, :, :48, 48:].sum(-1).mean(-1).numpy() for p in processors], axis=1)
    shares = text_shares(ours, *seen(full))
    np.testing.assert_allclose(shares, expected, rtol=1e-4)
    assert np.ptp(expected) > 0.05
    np.testing.assert_allclose(text_shares(ours, *seen(once)), expected, rtol=1e-4)


def test_a_model_without_preference_has_the_uniform_share():
    _, ours = make_pair(SMALL)
    for stack in ours.stacks:
        for stream in (stack.image, stack.text):
            stream.attention.q.kernel.set_value(jnp.zeros_like(stream.attention.q.kernel.get_value()))
            stream.attention.q.bias.set_value(jnp.zeros_like(stream.attention.q.bias.get_value()))
    inputs = make_inputs(SMALL, (12, 16), text=11)
    np.testing.assert_allclose(text_shares(ours, *seen(inputs)), uniform_share(48, 11), rtol=1e-5)
    assert jax.eval_shape(text_shares, ours, *seen(inputs)).shape == (2, 4, 3)
