"""Guidance by a perturbed prediction, runs that are perturbed themselves, and runs that start from an image."""

from __future__ import annotations

import itertools
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import jaxtyping
import numpy as np
import pytest
import torch
from diffusers import StableDiffusion3Img2ImgPipeline, StableDiffusion3Pipeline

import seg4diff_jax as s4d
from seg4diff_jax.flow import guided
from seg4diff_jax.models.attention import AttentionRequest, ForwardOptions
from seg4diff_jax.models.conditioning import TextConditioning
from seg4diff_jax.models.perturbation import Blur, Perturbation, Perturbing, skip_layers
from seg4diff_jax.models.sd3.model import MMDiT
from seg4diff_jax.sampling import GeneratingRun, Looking, sample_latents, sample_looking
from tests.reference.inputs import SIZE, a_noise
from tests.reference.random_weights import relative_error

PROMPTS = ["a photo of a cat on the grass", "two red buses"]
STEPS = 6
GRID = SIZE[0] // 16, SIZE[1] // 16
OPTIONS: dict[str, Any] = {"steps": STEPS, "size": SIZE, "negative_prompt": "a dog"}
BLUR = Blur(60.0, 151, text_tokens=(0, None))  # over nearly all of the text: small random weights look at all of it


def run_of(pipe: s4d.Pipeline, **options: Any) -> GeneratingRun:
    return pipe.generating_run(PROMPTS, **OPTIONS | {"guidance": 4.0} | options)


def sampled(pipe: s4d.Pipeline, **options: Any) -> np.ndarray:
    with pipe.settings():
        return np.asarray(sample_latents(pipe.transformer, run_of(pipe, **options)))


@partial(jax.jit, static_argnames=("perturb",))
def one_pass(
    transformer: MMDiT, latents: jax.Array, texts: TextConditioning, sigma: np.float32, perturb: Perturbation | None
) -> jax.Array:
    """The velocity from one forward pass of all rows, which are all perturbed or none."""
    perturbing = None
    if perturb is not None:
        blocks = jnp.asarray(perturb.of_blocks(transformer.depth))
        perturbing = Perturbing(perturb.change, jnp.tile(blocks[:, None], len(latents)), GRID)
    timesteps = jnp.full(len(latents), 1000 * sigma, jnp.float32)
    return transformer(latents, timesteps, texts, options=ForwardOptions(None, perturbing=perturbing))[0]


def written_out(pipe: s4d.Pipeline, perturb: Perturbation, scale: float | None, guidance: float) -> np.ndarray:
    """Euler's steps as a loop over separate passes of the plain and of the perturbed model."""
    run = run_of(pipe, guidance=guidance)
    latents, levels = run.latents, [*np.asarray(run.sigmas), np.float32(0)]
    negative = pipe.encode_prompts([OPTIONS["negative_prompt"]] * len(PROMPTS))
    for number, (sigma, following) in enumerate(itertools.pairwise(levels)):
        active = perturb.steps is None or STEPS - number in perturb.steps
        of = lambda texts, perturb, now=latents, level=sigma: one_pass(pipe.transformer, now, texts, level, perturb)
        of_half = lambda half, on=active: perturb if on and scale is None and perturb.half in ("both", half) else None
        towards = of(run.texts, of_half("prompt"))
        velocity = towards if guidance <= 1 else guided(towards, of(negative, of_half("negative")), guidance)
        if scale is not None and active:
            velocity = velocity + scale * (towards - of(run.texts, perturb))
        latents = latents + (following - sigma) * velocity
    return np.asarray(latents)


@pytest.mark.parametrize(
    ("perturb", "scale", "guidance"),
    [
        (Perturbation((1,), BLUR), 3.0, 4.0),
        (Perturbation((1, 3), BLUR, steps=(STEPS, 2)), 9.0, 4.0),
        (Perturbation((2,), Blur(1.0, over="image")), 2.0, 1.0),
        (Perturbation((2,), "skip", steps=(4, 3)), 2.8, 4.0),
        (Perturbation((1,), BLUR), None, 4.0),
        (Perturbation((1,), BLUR, half="prompt"), None, 4.0),
        (Perturbation((1,), BLUR, half="negative", steps=(5, 4)), None, 4.0),
        (Perturbation((0, 1, 2, 4), BLUR, steps=(1, 2)), None, 1.0),
    ],
)
def test_a_perturbed_run_is_a_loop_of_separate_passes(sd3, perturb, scale, guidance):
    """Guided away: c + (guidance - 1)(c - u) + scale (c - perturbed c), as SEG joins it to guidance."""
    found = sampled(sd3, perturb=perturb, perturbed_guidance=scale, guidance=guidance)
    assert relative_error(found, written_out(sd3, perturb, scale, guidance)) <= 1e-5
    assert relative_error(found, sampled(sd3, guidance=guidance)) > 1e-3, "the perturbation changes the picture"


@pytest.mark.parametrize("blur", [Blur(0.0), Blur(kernel=1)])
@pytest.mark.parametrize("scale", [None, 3.0])
def test_a_blur_of_no_width_is_the_plain_model_exactly(sd3, blur, scale):
    found = sampled(sd3, perturb=Perturbation((1, 2), blur), perturbed_guidance=scale)
    np.testing.assert_array_equal(found, sampled(sd3))


def test_guidance_away_costs_a_third_row_and_a_perturbed_run_none(sd3):
    """By what the compiler counts of a step."""

    def flops(**options: Any) -> float:
        lowered = sample_latents.lower(sd3.transformer, run_of(sd3, **options))
        return lowered.compile().cost_analysis()["flops"]

    perturbed = flops(perturb=Perturbation((1,)))
    assert flops(perturb=Perturbation((1,)), perturbed_guidance=2.0) / perturbed == pytest.approx(1.5, rel=0.05)
    assert perturbed <= 1.02 * flops()


def test_one_program_serves_every_block_step_and_scale(sd3):
    sampled(sd3, perturb=Perturbation((1,), steps=(2,)), perturbed_guidance=2.0)
    programs = sample_latents._cache_size()
    sampled(sd3, perturb=Perturbation((2, 3), steps=(4, 5)), perturbed_guidance=5.0, guidance=7.0, seed=2)
    assert sample_latents._cache_size() == programs


@pytest.mark.parametrize("steps", [None, (STEPS - 1, 1)])
def test_attention_is_read_in_a_run_that_is_guided_away(sd3, steps):
    """Of the prompts' own rows, which are not perturbed: in the first step that of the plain run."""
    options = {"perturb": Perturbation((1,), BLUR, steps), "perturbed_guidance": 3.0}
    request, looking = AttentionRequest(text_tokens=(0, None)), Looking((1, 4), (STEPS - 1, 0))
    look = lambda run: sample_looking(sd3.transformer, run, request, looking=looking)
    latents, records = look(run_of(sd3, **options))
    np.testing.assert_allclose(latents, sampled(sd3, **options), atol=1e-4)
    _, plain = look(run_of(sd3))
    for block in looking.blocks:
        np.testing.assert_allclose(records[block].probs[1], plain[block].probs[1], atol=1e-5)
        assert relative_error(records[block].probs[0], plain[block].probs[0]) > 1e-4


# ---- the same as diffusers ------------------------------------------------------------------------------------------


def loaded(kind: type, checkpoint: Any) -> Any:
    pipeline = kind.from_pretrained(checkpoint, text_encoder_3=None, tokenizer_3=None, torch_dtype=torch.float32)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def channels_first(array: np.ndarray) -> torch.Tensor:
    return torch.from_numpy(np.ascontiguousarray(np.moveaxis(array, -1, 1)))


def test_skip_layer_guidance_is_that_of_diffusers(request):
    checkpoint = request.getfixturevalue("sd35_medium_checkpoint")
    ours, noise = s4d.load(checkpoint), np.stack([a_noise(*SIZE, seed) for seed in range(2)])
    steps, blocks = 12, (1, 3)
    expected = loaded(StableDiffusion3Pipeline, checkpoint)(
        PROMPTS,
        negative_prompt=[OPTIONS["negative_prompt"]] * 2,
        height=SIZE[0],
        width=SIZE[1],
        latents=channels_first(noise),
        num_inference_steps=steps,
        guidance_scale=4.0,
        max_sequence_length=77,
        output_type="latent",
        skip_guidance_layers=list(blocks),
        skip_layer_guidance_stop=0.4,
    ).images.permute(0, 2, 3, 1)
    perturb = skip_layers(steps, blocks, stop=0.4)
    assert perturb.steps == (11, 10, 9, 8)
    found = sampled(ours, steps=steps, noise=noise, perturb=perturb, perturbed_guidance=2.8)
    assert relative_error(found, expected.numpy()) <= 1e-5
    assert relative_error(sampled(ours, steps=steps, noise=noise), expected.numpy()) > 1e-3


@pytest.mark.parametrize(("strength", "guidance"), [(0.6, 4.0), (1.0, 4.0), (0.35, 1.0)])
def test_image_to_image_is_that_of_diffusers(sd3, sd3_checkpoint, strength, guidance, monkeypatch):
    """From the same noise, and from the mean of the autoencoder's posterior, which diffusers draws from."""
    images = np.random.default_rng(0).integers(0, 256, (2, *SIZE, 3)).astype(np.uint8)
    noise = np.stack([a_noise(*SIZE, seed) for seed in range(2)])
    theirs = loaded(StableDiffusion3Img2ImgPipeline, sd3_checkpoint)
    of_module = StableDiffusion3Img2ImgPipeline.__module__
    monkeypatch.setattr(f"{of_module}.randn_tensor", lambda *_, **__: channels_first(noise))
    monkeypatch.setattr(f"{of_module}.retrieve_latents", lambda encoded, **_: encoded.latent_dist.mode())
    made = theirs(
        PROMPTS,
        image=channels_first(images.astype(np.float32) / 255),
        strength=strength,
        negative_prompt=[OPTIONS["negative_prompt"]] * 2,
        height=SIZE[0],
        width=SIZE[1],
        num_inference_steps=STEPS,
        guidance_scale=guidance,
        max_sequence_length=77,
        output_type="latent",
    ).images
    options: dict[str, Any] = {"noise": noise, "strength": strength, "guidance": guidance, "size": None}
    found = sampled(sd3, image=list(images), **options)
    assert relative_error(found, made.permute(0, 2, 3, 1).numpy()) <= 1e-5


# ---- from an image --------------------------------------------------------------------------------------------------


def test_a_run_from_an_image_takes_its_last_steps_and_keeps_its_aspect(sd3):
    image = np.random.default_rng(0).integers(0, 256, (96, 160, 3)).astype(np.uint8)
    run = sd3.generating_run(["a cat"], steps=10, image=image, strength=0.3)
    np.testing.assert_allclose(run.sigmas, sd3.schedule.sigmas(10)[-3:], rtol=1e-6)
    size = sd3.view.size((96, 160), None, "aspect")
    picture = sd3.generate("a cat", image=image, steps=2)
    assert picture.shape == (*size, 3)
    several = sd3.generate(PROMPTS, image=[image, image[::-1]], images_per_prompt=2, steps=2, strength=0.5)
    noise = sd3.view.noise(None, [0, 1, 2, 3], 4, size, 0)
    alone = sd3.generate(PROMPTS[1], image=image[::-1], steps=2, strength=0.5, noise=np.asarray(noise[3]))
    assert np.abs(several[3].astype(int) - alone).max() <= 1


def test_masks_are_read_in_the_steps_that_a_run_from_an_image_takes(sd3):
    image = np.zeros((*SIZE, 3), np.uint8)
    options: dict[str, Any] = {"image": image, "steps": 10, "strength": 0.3, "segment": ["cat", "grass"], "block": 1}
    _, masks = sd3.generate(PROMPTS[0], at_step=3, **options)
    noised = sd3.generating_run([PROMPTS[0]], image=image, steps=10, strength=0.3)
    record = one_record(sd3, noised)
    columns = {"cat": 5, "grass": 8}
    for name, scores in zip(masks.classes, masks.scores, strict=True):
        np.testing.assert_allclose(scores.ravel(), record[:, columns[name]], atol=1e-5)
    short = {**options, "strength": 0.2}  # the checkpoint's 8 of 28 is 3 of 10, before the run's first step
    default, expected = (sd3.generate(PROMPTS[0], **short, **each)[1] for each in ({}, {"at_step": 2}))
    np.testing.assert_array_equal(default.scores, expected.scores)
    with pytest.raises(ValueError, match=r"at_step is 4; expected a whole number, 1 \(the last step\) to 3"):
        sd3.generate(PROMPTS[0], at_step=4, **options)


def one_record(pipe: s4d.Pipeline, run: GeneratingRun) -> np.ndarray:
    """Of the run's first step, of block 1, averaged over heads."""
    request = AttentionRequest(mean_heads=True)
    _, records = sample_looking(pipe.transformer, run, request, looking=Looking((1,), (0,)))
    return np.asarray(records[1].probs)[0, 0]


# ---- what is wrong --------------------------------------------------------------------------------------------------

IMAGE = np.zeros((*SIZE, 3), np.uint8)
ONE = Perturbation((1,))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"perturb": Perturbation((6,))}, r"cannot perturb block 6: the model holds blocks 0\.\.5"),
        (
            {"perturb": Perturbation((1,), steps=(7,))},
            r"cannot perturb step 7: this run has steps 6 \(the first",
        ),
        ({"perturb": Perturbation((1,), half="prompt"), "guidance": 1.0}, "half is 'prompt', and it is of a run with"),
        ({"perturb": Perturbation((1,), half="prompt"), "perturbed_guidance": 2.0}, "half is 'prompt', and it is of"),
        ({"perturbed_guidance": 2.0}, "perturbed_guidance leads away from a perturbed prediction: name one with"),
        ({"perturb": ONE, "perturbed_guidance": float("nan")}, "perturbed_guidance is nan; expected a scale above 0"),
        ({"perturb": ONE, "perturbed_guidance": -2.0}, r"perturbed_guidance is -2\.0; expected a scale above 0"),
        ({"perturb": ONE, "perturbed_guidance": False}, "perturbed_guidance is False; expected a scale above 0"),
        ({"perturb": BLUR}, r"perturb is Blur\(.*; expected a Perturbation"),
        ({"strength": 0.5}, "strength says how far to go from an image: name one with image="),
        ({"image": IMAGE, "strength": 0.0}, "strength is 0.0; expected a number above 0 and at most 1"),
        ({"image": [IMAGE] * 3}, "3 images and 2 pictures; expected one for all, or one for each"),
        (
            {"image": [IMAGE, IMAGE[:48]], "size": None},
            "the images are of 2 sizes: name one for all pictures with size=",
        ),
    ],
)
def test_options_that_mean_nothing_are_refused(sd3, options, message, monkeypatch):
    monkeypatch.setattr(jaxtyping.config, "jaxtyping_disable", True)  # as for users: types are checked in tests only
    with pytest.raises(ValueError, match=message):
        run_of(sd3, **options)
