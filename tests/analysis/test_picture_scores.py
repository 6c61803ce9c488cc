"""CLIP-I, CLIP-T and DINO are the cosines of transformers' embeddings, of models that it has saved."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from transformers.models.bit.image_processing_pil_bit import BitImageProcessorPil
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil
from transformers.models.vit.image_processing_pil_vit import ViTImageProcessorPil

from seg4diff_jax.analysis.clip import Clip, load_clip
from seg4diff_jax.analysis.dino import Dino, load_dino
from seg4diff_jax.analysis.picture_scores import PictureScorers, clip_i, clip_t, dino
from seg4diff_jax.convert.errors import CheckpointError
from tests.reference.inputs import an_image
from tests.reference.scorers import save_scorers

SIZES = ((40, 57), (48, 32), (32, 32), (90, 61), (33, 70))
PICTURES = [an_image(*size, seed) for seed, size in enumerate(SIZES)]
REFERENCES = [an_image(*size, 10 + seed) // 2 for seed, size in enumerate(SIZES[::-1])]
PROMPTS = ["a cat", "two red buses", "sky", "a dog and a bird on grass", ""]


@pytest.fixture(scope="module")
def folders(tmp_path_factory) -> dict[str, Path]:
    return save_scorers(tmp_path_factory.mktemp("scorers"))


@pytest.fixture(scope="module")
def clip(folders) -> Clip:
    return load_clip(folders["clip"])


@pytest.fixture(scope="module")
def vit(folders) -> Dino:
    return load_dino(str(folders["vit"]))


def cosines(first: torch.Tensor, second: torch.Tensor) -> np.ndarray:
    return torch.nn.functional.cosine_similarity(first.double(), second.double()).numpy()


def seen(processor: Any, pictures: list[np.ndarray]) -> torch.Tensor:
    return processor(pictures, return_tensors="pt", input_data_format="channels_last").pixel_values


@torch.no_grad()
def expected_clip(folder: Path) -> tuple[np.ndarray, np.ndarray]:
    """CLIP-I and CLIP-T by transformers."""
    model = transformers.CLIPModel.from_pretrained(folder)
    processor = CLIPImageProcessorPil.from_pretrained(folder)
    tokenizer = transformers.CLIPTokenizer.from_pretrained(folder)
    project = lambda pictures: model.visual_projection(model.vision_model(seen(processor, pictures)).pooler_output)
    ids = tokenizer(PROMPTS, padding="max_length", max_length=77, return_tensors="pt").input_ids
    prompts = model.text_projection(model.text_model(ids).pooler_output)
    return cosines(project(PICTURES), project(REFERENCES)), cosines(project(PICTURES), prompts)


def test_clip_i_and_clip_t_are_those_of_transformers(clip, folders):
    images, texts = expected_clip(folders["clip"])
    np.testing.assert_allclose(clip_i(clip, PICTURES, REFERENCES), images, atol=1e-5)
    np.testing.assert_allclose(clip_t(clip, PICTURES, PROMPTS), texts, atol=1e-5)
    assert np.ptp(images) > 0.01
    assert np.ptp(texts) > 0.05


@pytest.mark.parametrize(
    ("name", "theirs", "processor"),
    [
        ("vit", transformers.ViTModel, ViTImageProcessorPil),
        ("dinov2", transformers.Dinov2Model, BitImageProcessorPil),
    ],
)
def test_dino_is_that_of_transformers(name, theirs, processor, folders):
    model, prepare = theirs.from_pretrained(folders[name]), processor.from_pretrained(folders[name])
    with torch.no_grad():
        tokens = [model(seen(prepare, shown)).last_hidden_state[:, 0] for shown in (PICTURES, REFERENCES)]
    found = dino(load_dino(folders[name]), PICTURES, REFERENCES)
    np.testing.assert_allclose(found, cosines(*tokens), atol=1e-5)
    assert np.ptp(found) > 0.01


def test_a_picture_with_itself_scores_1(clip, vit):
    np.testing.assert_allclose(clip_i(clip, PICTURES, PICTURES), 1, atol=1e-6)
    np.testing.assert_allclose(dino(vit, PICTURES, PICTURES), 1, atol=1e-6)


def test_scores_do_not_depend_on_batches(clip, vit):
    scorers = PictureScorers(clip, vit)
    whole = scorers.scores(PICTURES, REFERENCES, PROMPTS)
    for name, found in scorers.scores(PICTURES, REFERENCES, PROMPTS, batch=2).items():
        np.testing.assert_allclose(found, whole[name], atol=1e-6)


def test_scorers_return_every_score_and_name_its_model(clip, vit, folders):
    found = PictureScorers(clip, vit).scores(PICTURES, REFERENCES, PROMPTS)
    assert PictureScorers(clip, vit).models == {
        "CLIP-I": str(folders["clip"]),
        "CLIP-T": str(folders["clip"]),
        "DINO": str(folders["vit"]),
    }
    np.testing.assert_array_equal(found["CLIP-I"], clip_i(clip, PICTURES, REFERENCES))
    np.testing.assert_array_equal(found["CLIP-T"], clip_t(clip, PICTURES, PROMPTS))
    np.testing.assert_array_equal(found["DINO"], dino(vit, PICTURES, REFERENCES))
    alone = PictureScorers(clip)
    assert list(alone.scores(PICTURES, REFERENCES, PROMPTS)) == list(alone.models) == ["CLIP-I", "CLIP-T"]


def test_the_miniature_scores_pictures():
    miniature = load_clip("miniature")
    assert miniature.name == "miniature"
    np.testing.assert_allclose(clip_i(miniature, PICTURES[:2], PICTURES[:2]), 1, atol=1e-6)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda clip: clip_i(clip, PICTURES, REFERENCES[:2]), "found 5 pictures and 2 reference pictures"),
        (lambda clip: clip_t(clip, PICTURES, ["a cat"]), "found 5 pictures and 1 prompts"),
        (lambda clip: PictureScorers(clip).scores([], [], []), "found 0 pictures and 0 reference pictures"),
    ],
)
def test_what_is_not_paired_is_refused(call: Callable, message: str, clip):
    with pytest.raises(ValueError, match=message):
        call(clip)


def test_one_string_is_no_list_of_prompts(clip):
    with pytest.raises(TypeError, match="expected a list of prompts, found the string 'a cat'"):
        clip_t(clip, PICTURES, "a cat")


# ---- loading --------------------------------------------------------------------------------------------------------


def test_without_a_file_pictures_are_prepared_for_the_models_size(folders, tmp_path):
    sizes = {}
    for name, load in (("clip", load_clip), ("vit", load_dino), ("dinov2", load_dino)):
        copy = shutil.copytree(folders[name], tmp_path / name)
        (copy / "preprocessor_config.json").unlink()
        sizes[name] = load(copy).preprocessing.size
    assert sizes == {"clip": (32, 32), "vit": (32, 32), "dinov2": (224, 224)}


@pytest.mark.parametrize(
    ("name", "load", "side", "message"),
    [
        ("clip", load_clip, 40, "pictures are prepared as 40 x 40; this CLIP sees 32 x 32"),
        ("vit", load_dino, 36, "pictures are prepared as 36 x 36; expected multiples of the patch size, 8"),
    ],
)
def test_preprocessing_for_another_model_is_refused(name, load, side, message, folders, tmp_path):
    copy = shutil.copytree(folders[name], tmp_path / name)
    (copy / "preprocessor_config.json").write_text(json.dumps({"size": side, "crop_size": side}))
    with pytest.raises(CheckpointError, match=message):
        load(copy)


def test_a_tokenizer_with_more_words_than_the_encoder_is_refused(folders, tmp_path):
    copy = shutil.copytree(folders["clip"], tmp_path / "clip")
    words = json.loads((copy / "vocab.json").read_text())
    (copy / "vocab.json").write_text(json.dumps(words | {"more": max(words.values()) + 1}))
    with pytest.raises(CheckpointError, match=r"the tokenizer makes ids up to \d+, the text encoder embeds \d+"):
        load_clip(copy)


@pytest.mark.parametrize("load", [load_clip, load_dino])
def test_a_model_that_is_neither_here_nor_a_hub_id_is_refused(load):
    with pytest.raises(CheckpointError, match=r"^nowhere: no such directory, and not a Hub id like"):
        load("nowhere")
