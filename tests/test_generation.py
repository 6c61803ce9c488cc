"""Pictures from prompts are those of diffusers' StableDiffusion3Pipeline, given the same initial latents."""

from __future__ import annotations

import dataclasses
import itertools
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import jaxtyping
import numpy as np
import pytest
import torch
from diffusers import StableDiffusion3Pipeline

import seg4diff_jax as s4d
from seg4diff_jax.flow import FlowSchedule, euler, guided, image_noise
from seg4diff_jax.models.attention import AttentionRequest, ForwardOptions
from seg4diff_jax.passes import NoisedImages, attention, decode_pictures, velocity
from seg4diff_jax.sampling import GeneratingRun, Looking, sample_latents, sample_looking
from tests.reference.damage import with_damaged_autoencoder
from tests.reference.inputs import SQUARE, a_noise
from tests.reference.processes import flags
from tests.reference.random_weights import relative_error

SIZE = 64, 80
PROMPTS = ["a photo of a cat on the grass", "two red buses"]
NEGATIVE = "a small dog in the water"
STEPS = 5
ROOT = Path(__file__).parents[1]


@dataclasses.dataclass
class Pair:
    """Ours and diffusers' pipeline of one checkpoint. `length`: how many tokens T5, or its zeros, have."""

    ours: s4d.Pipeline
    theirs: Any
    length: int

    def make_theirs(self, noise: np.ndarray, prompts: list[str], output: str, **options) -> np.ndarray:
        made = self.theirs(
            prompts,
            height=8 * noise.shape[1],
            width=8 * noise.shape[2],
            latents=torch.from_numpy(noise).permute(0, 3, 1, 2),
            num_inference_steps=STEPS,
            max_sequence_length=self.length,
            output_type=output,
            **options,
        ).images
        return made.permute(0, 2, 3, 1).numpy() if output == "latent" else made

    def latents(self, noise: np.ndarray, prompts: list[str], negative: str, guidance: float) -> np.ndarray:
        ours = self.ours
        away = (ours.encode_prompts([negative]), jnp.float32(guidance)) if guidance > 1 else None
        sigmas = jnp.asarray(ours.schedule.sigmas(STEPS), jnp.float32)
        texts = ours.encode_prompts(prompts)
        return np.asarray(sample_latents(ours.transformer, GeneratingRun(jnp.asarray(noise), texts, sigmas, away)))


@pytest.fixture(scope="module")
def pair_of(request) -> Callable[[str, bool], Pair]:
    """Ours and diffusers' from the checkpoint of that fixture, with T5 or without."""
    made: dict[tuple[str, bool], Pair] = {}

    def make(fixture: str, t5: bool) -> Pair:
        if (fixture, t5) not in made:
            checkpoint = request.getfixturevalue(fixture)
            absent = {} if t5 else {"text_encoder_3": None, "tokenizer_3": None}
            theirs = StableDiffusion3Pipeline.from_pretrained(checkpoint, **absent)
            theirs.set_progress_bar_config(disable=True)
            made[fixture, t5] = Pair(s4d.load(checkpoint, t5=t5), theirs, 256 if t5 else 77)
        return made[fixture, t5]

    return make


def noise_of(count: int, size: tuple[int, int]) -> np.ndarray:
    return np.stack([a_noise(*size, seed) for seed in range(count)])


# ---- the same as diffusers ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("fixture", "t5", "guidance"),
    [
        ("sd3_checkpoint", False, 7.0),
        ("sd3_checkpoint", False, 1.0),
        ("sd3_checkpoint", True, 4.5),
        ("sd35_medium_checkpoint", False, 7.0),
        ("sd35_large_checkpoint", False, 1.0),
    ],
)
def test_latents_and_pictures_are_those_of_diffusers(pair_of, fixture, t5, guidance):
    pair, noise = pair_of(fixture, t5), noise_of(2, SIZE)
    options = {"negative_prompt": [NEGATIVE] * 2, "guidance_scale": guidance}
    expected = pair.make_theirs(noise, PROMPTS, "latent", **options)
    found = pair.latents(noise, PROMPTS, NEGATIVE, guidance)
    assert relative_error(found, expected) <= 1e-5
    assert relative_error(found[::-1], expected) > 0.1, "each prompt has its own picture"

    pixels = pair.make_theirs(noise, PROMPTS, "np", **options)
    pictures = pair.ours.generate(
        PROMPTS, negative_prompt=NEGATIVE, steps=STEPS, guidance=guidance, noise=noise, size=SIZE
    )
    apart = np.abs(np.stack(pictures) / 255.0 - pixels).max()
    assert all(picture.dtype == np.uint8 and picture.shape == (*SIZE, 3) for picture in pictures)
    assert np.abs(np.stack(pictures).astype(int) - np.round(255 * pixels)).max() <= 1
    assert 255 * apart <= 0.51
    assert np.std(pixels) > 0.05


def test_one_prompt_at_the_trained_size_without_options_is_diffusers_own_default(pair_of):
    pair, noise = pair_of("sd3_checkpoint", False), noise_of(1, (SQUARE, SQUARE))
    expected = pair.theirs(
        PROMPTS[0], latents=torch.from_numpy(noise).permute(0, 3, 1, 2), max_sequence_length=77, output_type="np"
    ).images
    picture = pair.ours.generate(PROMPTS[0], noise=noise[0])
    assert picture.shape == (SQUARE, SQUARE, 3)
    assert np.abs(picture.astype(int) - np.round(255 * expected[0])).max() <= 1


# ---- steps and guidance ---------------------------------------------------------------------------------------------


def test_euler_follows_a_straight_path_to_its_end_in_any_number_of_steps():
    noise, clean = jnp.asarray(noise_of(2, SIZE))
    for steps in (1, 7):
        sigmas = jnp.asarray(FlowSchedule().sigmas(steps))
        ends, _ = euler(lambda *step: ((noise - clean)[None], step[-1]), noise[None], sigmas)
        np.testing.assert_allclose(ends[0], clean, atol=1e-5)


def test_euler_takes_the_steps_of_a_loop_written_out():
    sigmas = FlowSchedule().sigmas(6)
    field = lambda latents, sigma, number, kept: (jnp.sin(3 * latents) + sigma, kept.at[number].set(sigma))
    expected = np.array(noise_of(1, (16, 16)), np.float64)
    for sigma, following in zip(sigmas, [*sigmas[1:], 0.0], strict=True):
        expected += (following - sigma) * (np.sin(3 * expected) + sigma)
    found, handed_on = euler(field, jnp.asarray(noise_of(1, (16, 16))), jnp.asarray(sigmas), jnp.zeros(6))
    np.testing.assert_allclose(found, expected, atol=1e-5)
    np.testing.assert_allclose(handed_on, sigmas, rtol=1e-6)


def test_guidance_runs_from_the_negative_prompt_through_the_prompt():
    towards, away = jnp.asarray(noise_of(2, SIZE))
    np.testing.assert_array_equal(guided(towards, away, 0.0), away)
    np.testing.assert_allclose(guided(towards, away, 1.0), towards, atol=1e-6)
    np.testing.assert_allclose(guided(towards, away, 3.0), 3 * towards - 2 * away, atol=1e-5)


def test_one_program_serves_every_guidance_prompt_and_seed_and_no_guidance_costs_half(sd3):
    inputs = jnp.zeros((1, 4, 4, 16)), sd3.encode_prompts(["cat"]), jnp.asarray(sd3.schedule.sigmas(3), jnp.float32)

    def cost(guidance) -> float:
        return (
            sample_latents.lower(sd3.transformer, GeneratingRun(*inputs, guidance)).compile().cost_analysis()["flops"]
        )

    assert cost((sd3.encode_prompts([""]), jnp.float32(7))) / cost(None) == pytest.approx(2, rel=0.05)

    sd3.generate("cat", steps=2, size=(32, 48), guidance=7.0)
    programs = sample_latents._cache_size()
    sd3.generate("a dog", steps=2, size=(32, 48), guidance=2.5, negative_prompt="sky", seed=4)
    assert sample_latents._cache_size() == programs
    sd3.generate("a dog", steps=2, size=(32, 48), guidance=1.0)
    sd3.generate("a dog", steps=2, size=(32, 48), guidance=0.0)
    assert sample_latents._cache_size() == programs + 1


@pytest.mark.parametrize("guidance", [1.0, 4.0])
def test_records_from_a_generating_run_are_those_of_a_pass_on_its_latents_of_that_step(sd3, guidance):
    """Of the half that follows the prompt; and looking changes no picture."""
    prompts, steps = ["a cat", "two red buses"], 4
    run = sd3.generating_run(prompts, steps=steps, guidance=guidance, size=(32, 48))
    looking, reader = Looking((1, 3, 5), (3, 0)), AttentionRequest(text_tokens=(0, None))
    latents, records = sample_looking(sd3.transformer, run, reader, looking=looking)
    np.testing.assert_allclose(latents, sample_latents(sd3.transformer, run), atol=1e-5)
    assert set(records) == {1, 3, 5}
    levels = [*np.asarray(run.sigmas), 0.0]
    for place, step in enumerate(looking.steps):
        # Euler's latents after some steps are those of a run that ends there.
        reached, after = run.latents, np.float32
        for sigma, following in itertools.pairwise(levels[: step + 1]):
            reached = reached + (after(following) - after(sigma)) * velocity_under(sd3, reached, after(sigma), run)
        seen = NoisedImages(reached, reached, after(levels[step]))
        expected = attention(sd3.transformer, seen, run.texts, blocks=looking.blocks, options=ForwardOptions(reader))
        for block, record in records.items():
            np.testing.assert_allclose(record.probs[place], expected[block].probs, atol=1e-5)


def velocity_under(pipe: s4d.Pipeline, latents: jax.Array, sigma: np.float32, run: GeneratingRun) -> jax.Array:
    seen = NoisedImages(latents, latents, sigma)
    towards, _ = velocity(pipe.transformer, seen, run.texts)
    if run.guidance is None:
        return towards
    negative = jax.tree.map(lambda leaf: jnp.repeat(leaf, len(latents), axis=0), run.guidance[0])
    return guided(towards, velocity(pipe.transformer, seen, negative)[0], run.guidance[1])


@pytest.mark.parametrize(
    ("blocks", "steps", "message"),
    [
        ((1,), (4,), "step 4 is not of this run: its 4 steps are 0..3"),
        ((1,), (-1,), "step -1 is not of this run"),
        ((6,), (1,), r"cannot capture blocks \[6\]"),
        ((), (1,), "expected at least one block and one step"),
        ((1,), (2, 0, 2), "expected each step once"),
    ],
)
def test_steps_and_blocks_that_a_run_does_not_have_are_refused(sd3, blocks, steps, message):
    run = sd3.generating_run(["a cat"], steps=4, size=(32, 48))
    with pytest.raises(ValueError, match=message):
        sample_looking(sd3.transformer, run, AttentionRequest(), looking=Looking(blocks, steps))


# ---- lists, noise ---------------------------------------------------------------------------------------------------


def test_pictures_of_a_list_are_those_made_alone_with_the_noise_of_their_place(sd3):
    options: dict[str, Any] = {"steps": 3, "size": SIZE, "seed": 5}
    listed = sd3.generate(PROMPTS, images_per_prompt=2, **options)
    assert len(listed) == 4
    noise = np.asarray(image_noise(5, range(4), (SIZE[0] // 8, SIZE[1] // 8, 16)))
    for place, picture in enumerate(listed):
        alone = sd3.generate(PROMPTS[place // 2], noise=noise[place], **options)
        assert np.abs(alone.astype(int) - picture).max() <= 1
    assert np.abs(listed[0].astype(int) - listed[1]).max() > 10
    assert isinstance(sd3.generate(PROMPTS[:1], **options), list)
    assert len(sd3.generate(PROMPTS[0], images_per_prompt=2, **options)) == 2
    assert sd3.generate([]) == []


def test_decoded_pixels_are_rounded_and_clipped(sd3):
    latents = jnp.asarray(4 * noise_of(1, SIZE))
    with sd3.settings():
        pictures, finite = decode_pictures(sd3.vae, latents)
        pixels = np.asarray(jax.jit(lambda vae, latents: vae.decode(latents))(sd3.vae, latents))
    expected = np.round(127.5 * pixels.clip(-1, 1) + 127.5)
    assert (pixels > 1).any()
    assert finite
    assert np.abs(np.asarray(pictures) - expected).max() <= 1


ON_EIGHT_DEVICES = f"""
import sys
import numpy as np
import seg4diff_jax as s4d
from seg4diff_jax.parallel import make_mesh

checkpoint, target = sys.argv[1:]
pipe = s4d.load(checkpoint, mesh=make_mesh(data=2, fsdp=2, tensor=2))
options = {{"images_per_prompt": 2, "steps": 2, "size": {SIZE}, "seed": 5}}
np.save(target, [pipe.generate({PROMPTS!r}, guidance=guidance, **options) for guidance in (1.0, 5.0)])
"""


def test_a_mesh_of_eight_devices_makes_the_pictures_of_one(sd3, sd3_checkpoint, tmp_path):
    sooner = flags("--xla_force_host_platform_device_count=8", "--xla_backend_optimization_level=0")  # to compile
    environment = os.environ | sooner | {"PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-c", ON_EIGHT_DEVICES, str(sd3_checkpoint), str(tmp_path / "pictures.npy")]
    run = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=600, cwd=tmp_path)
    assert run.returncode == 0, run.stderr
    options: dict[str, Any] = {"images_per_prompt": 2, "steps": 2, "size": SIZE, "seed": 5}
    for guidance, spread in zip((1.0, 5.0), np.load(tmp_path / "pictures.npy"), strict=True):
        alone = np.stack(sd3.generate(PROMPTS, guidance=guidance, **options))
        assert np.abs(spread.astype(int) - alone).max() <= 1


# ---- what is wrong --------------------------------------------------------------------------------------------------


def test_a_transformer_without_its_last_blocks_makes_no_pictures(sd3_checkpoint):
    with pytest.raises(
        ValueError, match=r"blocks 0\.\.1 of 0\.\.5 are loaded; pictures need all: load without blocks="
    ):
        s4d.load(sd3_checkpoint, blocks=2).generate("cat")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"steps": 0}, "steps is 0; expected a whole number, 1 to 1000"),
        ({"steps": 2.5}, "steps is 2.5; expected a whole number, 1 to 1000"),
        ({"guidance": float("nan")}, "guidance is nan; expected a number"),
        ({"guidance": "7"}, "guidance is '7'; expected a number"),
        ({"images_per_prompt": 0}, "images_per_prompt is 0; expected a whole number, at least 1"),
        ({"size": (100, 128)}, "size is 100 x 128; sides must be multiples of 16, up to 384"),
        ({"seed": -1}, "seed is -1; expected a whole number"),
        ({"noise": np.zeros((18, 14, 16), np.float32)}, r"noise is \[18, 14, 16\]; expected \[16, 16, 16\]"),
    ],
)
def test_options_that_mean_nothing_are_refused(sd3, options, message, monkeypatch):
    monkeypatch.setattr(jaxtyping.config, "jaxtyping_disable", True)  # as for users: types are checked in tests only
    with pytest.raises(ValueError, match=message):
        sd3.generate("cat", **options)


def test_pixels_that_are_not_finite_are_no_picture(sd3):
    with pytest.raises(FloatingPointError, match="not finite"):
        with_damaged_autoencoder(sd3).generate("cat", steps=1, size=(32, 32))
