"""Concept tokens are a text's own where they are its prompt, and change nothing; against PyTorch under a mask."""

from __future__ import annotations

import copy
import re
from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch

from seg4diff_jax.models.attention import AttentionRequest, ForwardOptions, joint_attention
from seg4diff_jax.models.concepts import attend_to_image_and_group, image_to_concepts, output_likeness
from seg4diff_jax.models.conditioning import TextConditioning
from seg4diff_jax.models.trunk import attention_at, attentions_at, concepts_at
from tests.reference.concepts import with_groups
from tests.reference.mmdit import VARIANTS, equal_tail, make_inputs, make_pair, run_torch
from tests.reference.random_weights import relative_error

SIZE, TEXT, GROUPS = (8, 12), 9, 3
LAST = 3
"""The last block, whose text is not updated."""


@pytest.fixture(scope="module", params=VARIANTS)
def variant(request) -> str:
    return request.param


@pytest.fixture(scope="module")
def pair(variant):
    return make_pair(VARIANTS[variant])


def groups_of(config: dict, images: int = 2, seed: int = 5) -> TextConditioning:
    drawn = make_inputs(config, SIZE, TEXT, batch=GROUPS * images, seed=seed)
    return drawn["conditioning"]


def maps_at(ours, inputs: dict, concepts: TextConditioning, block: int = LAST, tokens=(0, TEXT)) -> jax.Array:
    image, _, own, _ = concepts_at(ours, **inputs, concepts=concepts, block=block)
    return image_to_concepts(own, image, tokens)


@pytest.mark.parametrize("block", [0, 2, LAST])
def test_a_group_that_is_the_text_has_the_texts_states_and_maps(pair, variant, block):
    """Tokens that are equal, such as the zeros of an absent T5, are computed once here too."""
    _, ours = pair
    _, inputs = equal_tail(make_inputs(VARIANTS[variant], SIZE, TEXT), 4)
    image, text, own, _ = concepts_at(ours, **inputs, concepts=inputs["conditioning"], block=block)
    for mine, theirs in zip(jax.tree.leaves(own), jax.tree.leaves(text), strict=True):
        assert relative_error(mine, theirs) <= 1e-5
    request = AttentionRequest(text_tokens=(0, None))
    plain = attention_at(ours, **inputs, block=block, options=ForwardOptions(request))
    assert relative_error(image_to_concepts(own, image, (0, TEXT)), plain.probs) <= 1e-5
    image_outputs, text_outputs, _ = joint_attention(image, text)
    assert relative_error(attend_to_image_and_group(own, image), text_outputs) <= 1e-5
    assert image_outputs.shape == image.q.shape


def test_groups_change_neither_the_image_nor_each_other(pair, variant):
    _, ours = pair
    inputs, groups = make_inputs(VARIANTS[variant], SIZE, TEXT), groups_of(VARIANTS[variant])
    request = ForwardOptions(AttentionRequest(("image_to_text", "image_to_image"), qkv=True, text_tokens=(0, None)))
    plain = attentions_at(ours, **inputs, blocks=(1, LAST), options=request)
    image, text, own, records = concepts_at(ours, **inputs, concepts=groups, block=LAST, options=request, capture=(1,))
    for found, expected in zip(jax.tree.leaves(records[1]), jax.tree.leaves(plain[1]), strict=True):
        np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-6)
    assert relative_error(jnp.concatenate([image.k, text.k], axis=1), plain[LAST].k) <= 1e-5
    alone = jax.tree.map(lambda leaf: leaf[1::GROUPS], groups)
    assert relative_error(maps_at(ours, inputs, alone), image_to_concepts(own, image, (0, TEXT))[1::GROUPS]) <= 1e-5


def test_maps_are_those_of_pytorch_under_a_mask(pair, variant):
    """diffusers has one pooled text for all tokens: here each group has the image's."""
    theirs, ours = pair
    inputs, groups = make_inputs(VARIANTS[variant], SIZE, TEXT), groups_of(VARIANTS[variant])
    groups = replace(groups, pooled=jnp.repeat(inputs["conditioning"].pooled, GROUPS, axis=0))
    theirs = copy.deepcopy(theirs)
    processors = with_groups(theirs, TEXT, TEXT)
    behind = groups.context.reshape(2, GROUPS * TEXT, -1)
    whole = jnp.concatenate([inputs["conditioning"].context, behind], axis=1)
    with torch.no_grad():
        run_torch(theirs, inputs | {"conditioning": replace(inputs["conditioning"], context=whole)})
    for block, processor in enumerate(processors):
        found = maps_at(ours, inputs, groups, block).reshape(2, GROUPS, -1, 24, TEXT)
        for number in range(GROUPS):
            assert relative_error(found[:, number], processor.image_to_group(number)) <= 1e-5


def test_likeness_is_the_dot_product_with_the_mean_output_of_a_classes_tokens():
    draw = np.random.default_rng(0)
    image, own = (draw.standard_normal(shape).astype(np.float32) for shape in ((2, 6, 3, 4), (4, 5, 3, 4)))
    averaging = draw.random((4, 2, 5)).astype(np.float32)
    for head, chosen in ((None, [0, 1, 2]), (1, [1])):
        found = output_likeness(jnp.asarray(image), jnp.asarray(own), jnp.asarray(averaging), head)
        for group in range(4):
            seen = image[group // 2][:, chosen].reshape(6, -1)
            of_classes = averaging[group] @ own[group][:, chosen].reshape(5, -1)
            np.testing.assert_allclose(found[group], of_classes @ seen.T, rtol=1e-5, atol=1e-5)


def test_what_does_not_fit_is_refused(pair, variant):
    _, ours = pair
    inputs, groups = make_inputs(VARIANTS[variant], SIZE, TEXT), groups_of(VARIANTS[variant])
    with pytest.raises(ValueError, match=re.escape("cannot read block 4: the model holds blocks 0..3")):
        concepts_at(ours, **inputs, concepts=groups, block=4)
    odd = jax.tree.map(lambda leaf: leaf[:5], groups)
    with pytest.raises(ValueError, match=re.escape("5 prompts of concepts for 2 images: expected as many for each")):
        concepts_at(ours, **inputs, concepts=odd, block=1)
