"""Statistics of prompts: on pictures, in the generating run itself, and the groups that their tokens form."""

from __future__ import annotations

import dataclasses

import jax
import numpy as np
import pytest

import seg4diff_jax as s4d
from seg4diff_jax.analysis.block_statistics import block_statistics
from seg4diff_jax.analysis.prompt_statistics import on_pictures, while_generating
from seg4diff_jax.analysis.token_groups import token_groups
from seg4diff_jax.models.attention import AttentionRequest
from seg4diff_jax.models.conditioning import TextConditioning
from seg4diff_jax.passes import NoisedImages
from tests.reference.damage import with_damaged_autoencoder
from tests.reference.inputs import SQUARE, an_image

PROMPTS = ["a cat by the sea", "", "two red buses " * 40]
CLIP, ZEROS = 77, 77


def test_tokens_are_grouped_as_the_tokenizers_split_the_prompt(sd3):
    texts = sd3.encode_prompts(PROMPTS)
    groups = token_groups(sd3.tokenizers, PROMPTS, texts)
    assert groups.all_names == ("image", "clip start", "clip prompt", "clip end", "clip padding", "t5 zeros")
    sizes = groups.sizes(100)
    lengths = [min(len(sd3.tokenizers.clip_l(prompt).input_ids), CLIP) for prompt in PROMPTS]
    for size, length in zip(sizes.tolist(), lengths, strict=True):
        assert size == [100, 1, length - 2, 1, CLIP - length, ZEROS]
    # Each token is in one group, and the last one stands for all zeros.
    np.testing.assert_array_equal(groups.members.sum(axis=1), [[1] * CLIP + [ZEROS]] * 3)
    assert groups.members.shape[-1] == texts.context.shape[1]


def test_t5s_tokens_have_groups_of_their_own(sd3_checkpoint):
    pipe = s4d.load(sd3_checkpoint, t5=True, blocks=1)
    groups = token_groups(pipe.tokenizers, PROMPTS, pipe.encode_prompts(PROMPTS))
    assert groups.all_names[5:] == ("t5 prompt", "t5 end", "t5 padding")
    t5 = pipe.tokenizers.t5
    assert t5 is not None
    lengths = [min(len(t5(prompt).input_ids), 256) for prompt in PROMPTS]
    np.testing.assert_array_equal(groups.sizes(1)[:, 5:], [[n - 1, 1, 256 - n] for n in lengths])


def test_a_text_without_named_parts_is_refused(sd3):
    with pytest.raises(ValueError, match="the text's parts have no names"):
        token_groups(sd3.tokenizers, ["a cat"], TextConditioning(np.zeros((1, 9, 4)), np.zeros((1, 4))))


def test_statistics_on_pictures_are_those_of_the_attention_there(sd3):
    pictures = [an_image(SQUARE, SQUARE), an_image(SQUARE, SQUARE, seed=1)]
    found = on_pictures(sd3, pictures, PROMPTS[:2], step=5, seed=3)
    request = AttentionRequest(text_tokens=(0, None), qkv=True)
    records = sd3.attention(pictures, PROMPTS[:2], step=5, seed=3, size=(SQUARE, SQUARE), request=request)
    image_tokens = (SQUARE // 16) ** 2
    for prompt, by_block in enumerate(records):
        for block, record in by_block.items():
            probs = np.asarray(record.probs)[0]
            expected = probs.sum(-1).mean(-1)
            np.testing.assert_allclose(found.text_shares[prompt, block], expected, rtol=1e-4)
            on_padding = probs[..., [pad for pad in record.pads if pad < CLIP]].sum(-1).mean(-1)
            np.testing.assert_allclose(found.on("clip padding")[prompt, block], on_padding, rtol=1e-4)
            norms = np.linalg.norm(np.asarray(record.v)[0].reshape(image_tokens + CLIP + ZEROS, -1), axis=-1)
            text, image = norms[image_tokens:].mean(), norms[:image_tokens].mean()
            np.testing.assert_allclose(found.value_norms(*found.text_groups)[prompt, block], text, rtol=1e-4)
            np.testing.assert_allclose(found.value_norms("image")[prompt, block], image, rtol=1e-4)
    assert found.uniform_text_shares == pytest.approx((CLIP + ZEROS) / (image_tokens + CLIP + ZEROS))
    assert found.prompt_groups == ("clip prompt",)
    assert np.isnan(found.value_norms("clip prompt")[1]).all()  # the empty prompt has no words


def test_statistics_of_a_run_are_those_of_a_pass_on_its_latents_and_the_picture_is_the_same(sd3):
    prompts, steps = PROMPTS[:2], 3
    found, pictures = while_generating(sd3, prompts, at_steps=(3, 1), steps=steps, guidance=4.0, size=(32, 48))
    for ours, expected in zip(pictures, sd3.generate(prompts, steps=steps, guidance=4.0, size=(32, 48)), strict=True):
        assert np.abs(ours.astype(int) - expected).max() <= 1
    run = sd3.generating_run(prompts, steps=steps, guidance=4.0, size=(32, 48))
    seen = NoisedImages(run.latents, run.latents, np.float32(run.sigmas[0]))  # the first step, 3 of 3, sees the noise
    first = block_statistics(sd3.transformer, seen, run.texts, token_groups(sd3.tokenizers, prompts, run.texts))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5), found[0].blocks, first)
    assert np.abs(found[1].text_shares - found[0].text_shares).max() > 1e-3


@pytest.mark.parametrize(
    ("prompts", "at_steps", "message"),
    [
        (["a cat"], [4], r"step 4 to look at is not of this run: expected 1 \(the last\) to 3 \(the first\)"),
        (["a cat"], [0], "step 0 to look at is not of this run"),
        (["a cat"], [], "1 prompts and 0 steps to look at; expected at least one of each"),
        ([], [1], "0 prompts and 1 steps to look at"),
    ],
)
def test_runs_that_cannot_be_looked_at_are_refused(sd3, prompts, at_steps, message):
    with pytest.raises(ValueError, match=message):
        while_generating(sd3, prompts, at_steps=at_steps, steps=3, size=(32, 48))


def test_another_sampler_than_eulers_is_refused_as_for_pictures(sd3):
    pipe = dataclasses.replace(sd3, schedule=dataclasses.replace(sd3.schedule, sampler="DPMSolverMultistepScheduler"))
    with pytest.raises(ValueError, match="DPMSolverMultistepScheduler"):
        while_generating(pipe, ["a cat"], at_steps=[1], steps=1, size=(32, 48))
    while_generating(pipe, ["a cat"], at_steps=[1], steps=1, size=(32, 48), sampler="euler")


def test_one_prompt_for_each_picture_is_expected(sd3):
    with pytest.raises(ValueError, match="1 pictures and 2 prompts; expected one for each"):
        on_pictures(sd3, [an_image(SQUARE, SQUARE)], ["a", "b"])


def test_shares_that_are_not_finite_are_refused(sd3):
    with pytest.raises(FloatingPointError, match="shares of attention are not finite: damaged weights or inputs"):
        on_pictures(with_damaged_autoencoder(sd3), [an_image(SQUARE, SQUARE)], ["a cat"])
