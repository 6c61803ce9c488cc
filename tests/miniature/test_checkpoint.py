"""The checkpoint that comes with the package: diffusers reads it, the released algorithm agrees with ours on it, and
its attention finds what words name.
"""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import StableDiffusion3Pipeline
from transformers import CLIPImageProcessor, CLIPTextModelWithProjection, CLIPTokenizer, CLIPVisionModelWithProjection

import seg4diff_jax as s4d
from seg4diff_jax.analysis.clip import load_clip
from seg4diff_jax.command_line.evaluate import main
from seg4diff_jax.convert.sources.open import MINIATURE
from seg4diff_jax.flow import image_noise
from seg4diff_jax.miniature.world.shapes import CLASSES, scene
from seg4diff_jax.segmentation.metrics import mean_iou
from tests.reference.random_weights import relative_error
from tests.reference.release import Release, as_they_are
from tests.reference.ties import SCORES, assert_same_labels

COMPARED = 6


@pytest.fixture(scope="module")
def pipe() -> s4d.Pipeline:
    return s4d.load("miniature", dtype="float32")


def miou(scenes, labels) -> float:
    total = np.zeros((len(CLASSES), len(CLASSES)), np.int64)
    for shown, found in zip(scenes, labels, strict=True):
        np.add.at(total, (shown.labels, np.asarray(shown.classes)[found]), 1)
    return 100 * mean_iou(total)


def test_the_weights_are_small():
    assert sum(path.stat().st_size for path in MINIATURE.rglob("*") if path.is_file()) <= 40e6


def test_words_find_what_they_name_and_other_words_do_not(pipe):
    scenes = [scene("test", 1000 + index, pipe.trained_size) for index in range(40)]
    names = [[CLASSES[index] for index in shown.classes] for shown in scenes]
    images = [shown.image for shown in scenes]
    right = [masks.labels for masks in pipe.segment(images, names)]
    # Each name's map under the next one's number.
    wrong = [(labels + 1) % len(shown.classes) for labels, shown in zip(right, scenes, strict=True)]
    assert miou(scenes, right) > 55
    assert miou(scenes, wrong) < 15


def test_masks_are_those_of_the_released_algorithm(pipe):
    release = Release(MINIATURE)
    scenes = [scene("test", index, pipe.trained_size) for index in range(COMPARED)]
    names = [[CLASSES[index] for index in shown.classes] for shown in scenes]
    side = pipe.trained_size // pipe.vae.config.downsampling
    noise = np.asarray(image_noise(0, range(COMPARED), (side, side, pipe.vae.config.latent_channels)))
    ours = pipe.segment([shown.image for shown in scenes], names, noise=noise)
    block, step = pipe.expert_block, pipe.expert_step
    theirs = [
        release.segment(as_they_are(shown.image), words, eps, block=block, step=step, label_size=shown.labels.shape)
        for shown, words, eps in zip(scenes, names, noise, strict=True)
    ]
    for mine, other in zip(ours, theirs, strict=True):
        assert relative_error(mine.scores, other.scores) <= SCORES
        assert_same_labels(mine.labels, other.labels, other.scores)
    found = [miou(scenes, [masks.labels for masks in results]) for results in (ours, theirs)]
    assert found[0] == pytest.approx(found[1], abs=0.1)


def test_pictures_are_those_of_diffusers(pipe):
    theirs = StableDiffusion3Pipeline.from_pretrained(
        MINIATURE, text_encoder_3=None, tokenizer_3=None, torch_dtype=torch.float32
    )
    theirs.set_progress_bar_config(disable=True)
    side = pipe.trained_size // pipe.vae.config.downsampling
    noise = np.random.default_rng(0).standard_normal((2, side, side, pipe.vae.config.latent_channels), np.float32)
    prompts = ["a red ball on sand", "grass cross water"]
    expected = theirs(
        prompts,
        num_inference_steps=6,
        guidance_scale=4.0,
        latents=torch.from_numpy(noise.transpose(0, 3, 1, 2).copy()),
        output_type="np",
        max_sequence_length=77,
        height=pipe.trained_size,
        width=pipe.trained_size,
    ).images
    found = pipe.generate(prompts, noise=noise, steps=6, guidance=4.0)
    assert np.abs(np.stack(found) - 255 * expected).max() <= 1.01


def test_transformers_clip_judges_pictures_as_ours_does(pipe):
    clip = load_clip(MINIATURE)
    scenes = [scene("test", index, pipe.trained_size) for index in range(8)]
    vision = CLIPVisionModelWithProjection.from_pretrained(MINIATURE / "image_encoder").float().eval()
    text = CLIPTextModelWithProjection.from_pretrained(MINIATURE / "text_encoder").float().eval()
    tokenizer = CLIPTokenizer.from_pretrained(MINIATURE / "tokenizer")
    preprocess = CLIPImageProcessor.from_pretrained(MINIATURE / "image_encoder")
    captions = [shown.caption for shown in scenes]
    with torch.no_grad():
        pixels = preprocess([shown.image for shown in scenes], return_tensors="pt")["pixel_values"]
        ids = tokenizer(captions, padding="max_length", max_length=77, return_tensors="pt")
        pictures, prompts = vision(pixels).image_embeds, text(ids.input_ids).text_embeds
        theirs = torch.cosine_similarity(pictures[:, None], prompts[None], dim=-1).numpy()
    ours = clip.similarities([shown.image for shown in scenes], captions)
    np.testing.assert_allclose(ours, theirs, atol=1e-5)
    assert (ours.argmax(1) == np.arange(len(scenes))).mean() > 0.5  # chance: 0.125


def test_evaluation_without_arguments_is_of_the_miniature_on_test_scenes(tmp_path: Path):
    assert main(["--data.scenes", "12", "--seeds", "0", "--out", str(tmp_path / "out"), "--pictures", "2"]) == 0
    results = json.loads((tmp_path / "out" / "results.json").read_text())
    (row,) = results["rows"]
    assert row["images"] == 12
    assert row["miou"] > 45
    assert max(baseline["miou"] for baseline in results["baselines"]) < 30
