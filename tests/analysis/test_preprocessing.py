"""Pictures are prepared as transformers' processors that use Pillow prepare them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from transformers.models.bit.image_processing_pil_bit import BitImageProcessorPil
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil
from transformers.models.vit.image_processing_pil_vit import ViTImageProcessorPil

from seg4diff_jax.analysis import preprocessing
from seg4diff_jax.analysis.preprocessing import Preprocessing, prepared, read_preprocessing
from seg4diff_jax.convert.errors import CheckpointError
from tests.reference.inputs import an_image

PICTURES = [an_image(*size) for size in ((40, 57), (61, 90), (224, 224), (300, 257), (33, 517), (7, 5))]
FILES = {
    "CLIP, old file": {
        "crop_size": 224,
        "do_center_crop": True,
        "do_normalize": True,
        "do_resize": True,
        "feature_extractor_type": "CLIPFeatureExtractor",
        "image_mean": [0.48145466, 0.4578275, 0.40821073],
        "image_std": [0.26862954, 0.26130258, 0.27577711],
        "resample": 3,
        "size": 224,
    },
    "DINO": {
        "do_normalize": True,
        "do_resize": True,
        "feature_extractor_type": "ViTFeatureExtractor",
        "image_mean": [0.485, 0.456, 0.406],
        "image_std": [0.229, 0.224, 0.225],
        "resample": 2,
        "size": 224,
    },
    "DINOv2": {
        "crop_size": {"height": 224, "width": 224},
        "do_center_crop": True,
        "do_convert_rgb": True,
        "do_normalize": True,
        "do_rescale": True,
        "do_resize": True,
        "image_mean": [0.485, 0.456, 0.406],
        "image_processor_type": "BitImageProcessor",
        "image_std": [0.229, 0.224, 0.225],
        "resample": 3,
        "rescale_factor": 0.00392156862745098,
        "size": {"shortest_edge": 256},
    },
}
"""Files in the forms that transformers has written over the years."""
DEFAULTS = {"CLIP, old file": preprocessing.CLIP, "DINO": preprocessing.DINO, "DINOv2": preprocessing.DINOV2}
OTHERS = {
    "nothing but the kind, CLIP": {"image_processor_type": "CLIPImageProcessor"},
    "nothing but the kind, ViT": {"image_processor_type": "ViTImageProcessorFast"},
    "nothing but the kind, Bit": {"image_processor_type": "BitImageProcessor"},
    "oblong": {"image_processor_type": "ViTImageProcessor", "size": {"height": 32, "width": 48}, "resample": 0},
    "black around a small picture": {"size": {"shortest_edge": 30}, "crop_size": {"height": 47, "width": 64}},
    "no steps but the crop": {"do_resize": False, "do_normalize": False, "do_rescale": False, "crop_size": 20},
    "no crop": {"do_center_crop": False, "size": {"height": 24, "width": 24}, "resample": 1},
    "a crop where there is none": {
        "image_processor_type": "ViTImageProcessor",
        "size": 40,
        "do_center_crop": True,
        "crop_size": {"height": 32, "width": 24},
    },
    "another scale": {"rescale_factor": 1 / 127.5, "image_mean": [1, 1, 1], "image_std": [1.0, 2, 0.5]},
}
PROCESSORS = {"CLIP": CLIPImageProcessorPil, "ViT": ViTImageProcessorPil, "Bit": BitImageProcessorPil}


def read(named: dict[str, Any], folder: Path, default: Preprocessing = preprocessing.CLIP) -> Preprocessing:
    (folder / preprocessing.FILE).write_text(json.dumps(named))
    return read_preprocessing(folder, default)


@pytest.mark.parametrize("name", FILES | OTHERS)
def test_the_numbers_are_those_of_transformers(name, tmp_path):
    named = (FILES | OTHERS)[name]
    found = read(named, tmp_path)
    kind = named.get("image_processor_type", named.get("feature_extractor_type", "CLIP"))
    processor = next(each for start, each in PROCESSORS.items() if kind.startswith(start)).from_pretrained(tmp_path)
    for picture in PICTURES:
        expected = processor(picture, return_tensors="np", input_data_format="channels_last").pixel_values[0]
        ours = prepared(picture, found)
        assert ours.shape[:2] == found.size
        np.testing.assert_array_equal(ours, expected.transpose(1, 2, 0))


@pytest.mark.parametrize("name", FILES)
def test_the_defaults_are_those_of_a_file_that_says_all(name, tmp_path):
    default = DEFAULTS[name]
    assert read_preprocessing(tmp_path, default) == default
    assert read(FILES[name], tmp_path, default) == default


def test_a_file_that_names_no_processor_changes_what_it_names(tmp_path):
    found = read({"image_mean": [0, 0, 0], "size": 64}, tmp_path, preprocessing.DINO)
    assert found.resize == (64, 64)
    assert (found.mean, found.std) == ((0, 0, 0), preprocessing.DINO.std)


@pytest.mark.parametrize(
    ("named", "message"),
    [
        (
            {"image_processor_type": "SiglipImageProcessor"},
            "image_processor_type is 'Siglip.*; implemented",
        ),
        ({"size": {"longest_edge": 3}}, "size is .*; expected a shortest_edge, or a height and a width, of 1 to 4096"),
        ({"image_processor_type": ["CLIP"]}, r"image_processor_type is \['CLIP'\]; implemented"),
        ({"size": 0}, "size is 0; expected"),
        ({"crop_size": {"shortest_edge": 224}}, "crop_size is .*; expected a height and a width of 1 to 4096"),
        ({"crop_size": 10**9}, "crop_size is 1000000000; expected"),
        (
            {"image_processor_type": "ViTImageProcessor", "do_center_crop": True},
            "do_center_crop is true without a",
        ),
        ({"do_center_crop": False}, "pictures would differ in size"),
        ({"do_resize": "yes"}, "do_resize is 'yes'; expected true or false"),
        ({"resample": 9}, "resample is 9; expected one of Pillow's filters, 0 to 5"),
        ({"rescale_factor": 0}, "rescale_factor is 0; expected a number above 0"),
        ({"image_mean": 0.5}, "image_mean is 0.5; expected a number for each of three channels"),
        ({"image_std": [1, 1, 0]}, r"image_std is \[1, 1, 0\]; expected a number for each of three channels"),
    ],
)
def test_what_cannot_be_done_is_refused_by_file_and_key(named, message, tmp_path):
    with pytest.raises(CheckpointError, match=rf"{preprocessing.FILE}: {message}"):
        read(named, tmp_path)
