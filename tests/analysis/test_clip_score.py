"""Pictures against prompts by CLIP: cosines equal transformers', ranks equal a count over every choice."""

from __future__ import annotations

import itertools
import shutil
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest
import torch
import transformers
from transformers import CLIPTextModelWithProjection, CLIPVisionModelWithProjection

from seg4diff_jax.analysis.clip import Clip, load_clip
from seg4diff_jax.analysis.clip_score import clip_scores, cosine_similarities, rank_accuracy, unit_vectors
from seg4diff_jax.analysis.preprocessing import prepared
from seg4diff_jax.convert.errors import CheckpointError
from tests.reference.inputs import an_image
from tests.reference.random_weights import randomize_

PROMPTS = ["a cat", "two red buses", "sky"]
PICTURES = [an_image(40, 57, 0), an_image(48, 32, 1), an_image(32, 32, 2), an_image(90, 61, 3)]


@pytest.fixture(scope="module")
def checkpoint(sd3_checkpoint, tmp_path_factory) -> Path:
    """The small SD3 with an image encoder in the space of its first text encoder."""
    directory = tmp_path_factory.mktemp("clip") / "sd3"
    shutil.copytree(sd3_checkpoint, directory, ignore=shutil.ignore_patterns("transformer", "vae", "*_3"))
    config = transformers.CLIPVisionConfig(
        hidden_size=32,
        intermediate_size=64,
        projection_dim=24,
        num_hidden_layers=2,
        num_attention_heads=4,
        image_size=32,
        patch_size=8,
    )
    randomize_(CLIPVisionModelWithProjection(config)).save_pretrained(directory / "image_encoder")
    return directory


@pytest.fixture(scope="module")
def clip(checkpoint) -> Clip:
    return load_clip(checkpoint)


def brute_force(similarities: np.ndarray, choices: int) -> float:
    """Over every choice of the other prompts: 1 for first, 1/n for one of n that are first together."""
    credits = []
    for picture, row in enumerate(similarities):
        others = [prompt for prompt in range(len(row)) if prompt != picture]
        for drawn in itertools.combinations(others, choices - 1):
            scores = row[[picture, *drawn]]
            credits.append((scores[0] == scores.max()) / (scores == scores.max()).sum())
    return float(np.mean(credits))


# ---- ranks ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("levels", [2, 4, 1000])
@pytest.mark.parametrize("choices", [1, 2, 4, 7])
def test_the_rank_accuracy_is_the_mean_over_every_choice_of_the_others(choices, levels):
    for seed in range(4):
        drawn = np.random.default_rng(seed).integers(0, levels, (7, 7)).astype(np.float32) / levels
        assert float(rank_accuracy(jnp.asarray(drawn), choices)) == pytest.approx(brute_force(drawn, choices), abs=1e-5)


def test_perfect_pictures_score_1_and_pictures_that_tell_nothing_score_chance():
    assert float(rank_accuracy(jnp.eye(40))) == pytest.approx(1)
    assert float(rank_accuracy(-jnp.eye(40))) == pytest.approx(0)
    assert float(rank_accuracy(jnp.ones((40, 40)))) == pytest.approx(1 / 16, rel=1e-4)
    noise = jnp.asarray(np.random.default_rng(0).normal(size=(400, 400)), jnp.float32)
    assert float(rank_accuracy(noise)) == pytest.approx(1 / 16, abs=0.02)


@pytest.mark.parametrize("choices", [0, 5])
def test_more_choices_than_prompts_are_refused(choices):
    with pytest.raises(ValueError, match=f"choices is {choices}; expected 1 to the number of prompts, 4"):
        rank_accuracy(jnp.eye(4), choices)


# ---- similarities ---------------------------------------------------------------------------------------------------


def test_cosines_do_not_depend_on_lengths():
    first, second = (np.random.default_rng(seed).normal(size=(5, 8)).astype(np.float32) for seed in (0, 1))
    expected = np.array([[a @ b / np.sqrt((a @ a) * (b @ b)) for b in second] for a in first])
    for scale in (1, 1000):
        found = cosine_similarities(unit_vectors(jnp.asarray(scale * first)), unit_vectors(jnp.asarray(second)))
        np.testing.assert_allclose(found, expected, atol=1e-6)
    np.testing.assert_allclose(clip_scores(found), 100 * np.maximum(np.diag(expected), 0), atol=1e-4)


@torch.no_grad()
def test_similarities_are_those_of_transformers(clip, checkpoint):
    processor = transformers.CLIPImageProcessor(size={"shortest_edge": 32}, crop_size={"height": 32, "width": 32})
    seen = processor(PICTURES, return_tensors="pt").pixel_values
    pixels = np.stack([prepared(picture, clip.preprocessing) for picture in PICTURES])
    np.testing.assert_allclose(pixels, seen.permute(0, 2, 3, 1), atol=1e-6)
    tokenizer = transformers.CLIPTokenizer.from_pretrained(checkpoint / "tokenizer")
    ids = tokenizer(PROMPTS, padding="max_length", max_length=77, return_tensors="pt").input_ids
    pictures = CLIPVisionModelWithProjection.from_pretrained(checkpoint / "image_encoder")(seen).image_embeds
    prompts = CLIPTextModelWithProjection.from_pretrained(checkpoint / "text_encoder")(ids).text_embeds
    expected = torch.nn.functional.cosine_similarity(pictures[:, None], prompts[None], dim=-1)
    found = clip.similarities(PICTURES, PROMPTS)
    assert found.shape == (4, 3)
    np.testing.assert_allclose(found, expected, atol=1e-5)
    np.testing.assert_allclose(clip.similarities(PICTURES, PROMPTS, batch=3), found, atol=1e-6)
    assert np.ptp(found) > 0.05


def test_a_picture_of_the_towers_size_is_not_resampled(clip):
    how = clip.preprocessing
    np.testing.assert_allclose(prepared(PICTURES[2], how) * how.std + how.mean, PICTURES[2] / 255.0, atol=1e-6)


# ---- loading --------------------------------------------------------------------------------------------------------


def test_the_pixels_mean_and_deviation_are_the_checkpoints_own(checkpoint, tmp_path):
    copy = shutil.copytree(checkpoint, tmp_path / "copy")
    own = '{"image_mean": [0.5, 0.5, 0.5], "image_std": [0.5, 0.5, 0.5]}'
    (copy / "image_encoder" / "preprocessor_config.json").write_text(own)
    pixels = prepared(PICTURES[2], load_clip(copy).preprocessing)
    np.testing.assert_allclose(pixels, PICTURES[2] / 127.5 - 1, atol=1e-6)


def test_folders_that_are_absent_or_damaged_are_named(checkpoint, sd3_checkpoint, tmp_path):
    with pytest.raises(CheckpointError, match=r"image_encoder/config.json: no such file; it describes CLIP's vision"):
        load_clip(sd3_checkpoint)
    copy = shutil.copytree(checkpoint, tmp_path / "copy")
    config = copy / "image_encoder" / "config.json"
    config.write_text(config.read_text().replace('"num_hidden_layers": 2', '"num_hidden_layers": 3'))
    with pytest.raises(CheckpointError, match=r"(?s)model.safetensors does not match .*missing tensor"):
        load_clip(copy)
    config.unlink()
    (copy / "image_encoder" / "model.safetensors").unlink()
    shutil.copy(checkpoint / "image_encoder" / "config.json", config)
    with pytest.raises(CheckpointError, match=r"model\.safetensors"):
        load_clip(copy)


def test_no_pictures_and_no_prompts_are_refused(clip):
    with pytest.raises(ValueError, match="at least one picture"):
        clip.similarities([], PROMPTS)
    with pytest.raises(ValueError, match="at least one prompt"):
        clip.similarities(PICTURES, [])
