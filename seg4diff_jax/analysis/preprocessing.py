"""Prepares pictures for the models that score them, as the `preprocessor_config.json` beside their weights says."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Float, UInt8
from PIL import Image

from seg4diff_jax.convert.errors import CheckpointError
from seg4diff_jax.convert.files import read_json
from seg4diff_jax.quoting import quoted

FILE = "preprocessor_config.json"
LARGEST = 4096
"""Most pixels of a side that pictures are resized or cropped to."""
SIDES = ("height", "width")
Size = tuple[int, int]
"""Height and width, in pixels."""
Channels = tuple[float, float, float]


@dataclass(frozen=True)
class Preprocessing:
    """How pictures become a model's input: resized, cropped, scaled and normalised, in this order.

    Attributes:
      resize: length of the shorter side, or height and width; None to leave the size as it is.
      crop: height and width of the middle that is cut out, with black around what is too small; None for all.
      resample: Pillow's filter.
      scale: factor of the values 0..255.
      mean, std: of each channel, after scaling.

    Raises:
      ValueError: the size of what is made would depend on the picture.
    """

    resize: int | Size | None
    crop: Size | None
    resample: Image.Resampling
    scale: float
    mean: Channels
    std: Channels

    def __post_init__(self) -> None:
        if self.crop is None and not isinstance(self.resize, tuple):
            raise ValueError("pictures would differ in size: expected a crop, or a height and a width to resize to")

    @property
    def size(self) -> Size:
        """Height and width of prepared pictures."""
        size = self.crop or self.resize
        assert isinstance(size, tuple)
        return size


CLIP = Preprocessing(
    *(224, (224, 224), Image.Resampling.BICUBIC, 1 / 255),
    mean=(0.48145466, 0.4578275, 0.40821073),
    std=(0.26862954, 0.26130258, 0.27577711),
)
"""That of OpenAI's CLIP, and the default of transformers' CLIPImageProcessor and BitImageProcessor."""
VIT = Preprocessing((224, 224), None, Image.Resampling.BILINEAR, 1 / 255, mean=(0.5, 0.5, 0.5), std=(0.5, 0.5, 0.5))
"""The default of transformers' ViTImageProcessor."""
DINO = replace(VIT, mean=(0.485, 0.456, 0.406), std=(0.229, 0.224, 0.225))
"""The whole picture squeezed into a square, with ImageNet's mean and deviation, by which DINO was trained."""
DINOV2 = replace(CLIP, resize=256, mean=DINO.mean, std=DINO.std)
"""The middle of the picture, with the same mean and deviation, by which DINOv2 was trained too."""
PROCESSORS = {"CLIP": CLIP, "ViT": VIT, "Bit": CLIP}
"""transformers' image processors that are implemented, by the beginning of their names, with their defaults."""
ENDINGS = ("ImageProcessorFast", "ImageProcessorPil", "ImageProcessor", "FeatureExtractor")


def prepared(
    picture: UInt8[np.ndarray, "height width 3"], preprocessing: Preprocessing
) -> Float[np.ndarray, "rows columns 3"]:
    """Returns a picture as a model's input. The numbers are those of transformers' processors that use Pillow."""
    image, resize = Image.fromarray(picture), preprocessing.resize
    if isinstance(resize, int):
        shorter = min(image.size)
        resize = (int(resize * image.height / shorter), int(resize * image.width / shorter))
    if resize is not None:
        image = image.resize((resize[1], resize[0]), preprocessing.resample)
    if preprocessing.crop is not None:
        height, width = preprocessing.crop
        left, top = (image.width - width) // 2, (image.height - height) // 2
        image = image.crop((left, top, left + width, top + height))
    values = (np.asarray(image, np.float64) * preprocessing.scale).astype(np.float32)
    return (values - np.asarray(preprocessing.mean, np.float32)) / np.asarray(preprocessing.std, np.float32)


def read_preprocessing(folder: Path, default: Preprocessing) -> Preprocessing:
    """Reads a folder's `preprocessor_config.json`.

    Args:
      default: what holds if there is no such file. If the file names no processor, it also holds for absent keys.

    Raises:
      CheckpointError: the file is damaged, names another processor, or leaves pictures of different sizes.
    """
    file = folder / FILE
    if not file.is_file():
        return default
    try:
        return _parsed(read_json(file), default)
    except CheckpointError:
        raise
    except ValueError as error:
        raise CheckpointError(f"{file}: {error}") from None


def _parsed(named: Mapping[str, Any], default: Preprocessing) -> Preprocessing:
    """Reads transformers' keys, old and new. Raises ValueError, which names the key."""
    start = _processor(named, default)
    does = {step: _flag(named, step) for step in ("do_resize", "do_center_crop", "do_rescale", "do_normalize")}
    shorter = isinstance(start.resize, int)
    return Preprocessing(
        resize=_size(named, "size", shorter, start.resize) if does["do_resize"] else None,
        crop=_crop(named, start, does["do_center_crop"]),
        resample=_resample(named, start.resample),
        scale=_scale(named, start.scale) if does["do_rescale"] else 1.0,
        mean=_channels(named, "image_mean", start.mean) if does["do_normalize"] else (0.0, 0.0, 0.0),
        std=_channels(named, "image_std", start.std) if does["do_normalize"] else (1.0, 1.0, 1.0),
    )


def _processor(named: Mapping[str, Any], default: Preprocessing) -> Preprocessing:
    kind = named.get("image_processor_type", named.get("feature_extractor_type"))
    if kind is None:
        return default
    for name, start in PROCESSORS.items():
        if kind in [name + ending for ending in ENDINGS]:
            return start
    implemented = ", ".join(f"{name}ImageProcessor" for name in PROCESSORS)
    raise ValueError(f"image_processor_type is {quoted(kind)}; implemented: {implemented}")


def _flag(named: Mapping[str, Any], key: str) -> bool | None:
    """Returns whether a step is done. Default: True, and None for the crop, which not all processors make."""
    value = named.get(key)
    if value is None:
        return None if key == "do_center_crop" else True
    if not isinstance(value, bool):
        raise ValueError(f"{key} is {quoted(value)}; expected true or false")
    return value


def _crop(named: Mapping[str, Any], start: Preprocessing, wanted: bool | None) -> Size | None:
    if wanted is False or (wanted is None and start.crop is None):
        return None
    size = _size(named, "crop_size", False, start.crop)
    if not isinstance(size, tuple):
        raise ValueError("do_center_crop is true without a crop_size; expected a height and a width")
    return size


def _size(named: Mapping[str, Any], key: str, shorter: bool, default: int | Size | None) -> int | Size | None:
    """Reads a size. Old files give one number: the length of the shorter side if `shorter`, or else of both."""
    value = named.get(key)
    if value is None:
        return default
    if isinstance(value, dict) and set(value) == {"shortest_edge"} and key == "size":
        shorter, sides = True, [value["shortest_edge"]]
    elif isinstance(value, dict):
        sides = [value[side] for side in SIDES] if set(value) == set(SIDES) else []
    else:
        sides = [value] if shorter else [value, value]
    if not sides or not all(type(side) is int and 1 <= side <= LARGEST for side in sides):
        forms = "a shortest_edge, or a height and a width," if key == "size" else "a height and a width"
        raise ValueError(f"{key} is {quoted(value)}; expected {forms} of 1 to {LARGEST} pixels")
    return (sides[0], sides[1]) if len(sides) == 2 else sides[0]


def _resample(named: Mapping[str, Any], default: Image.Resampling) -> Image.Resampling:
    value = named.get("resample")
    if value is None:
        return default
    if type(value) is not int or value not in {each.value for each in Image.Resampling}:
        raise ValueError(f"resample is {quoted(value)}; expected one of Pillow's filters, 0 to 5")
    return Image.Resampling(value)


def _scale(named: Mapping[str, Any], default: float) -> float:
    value = named.get("rescale_factor")
    if value is None:
        return default
    if type(value) not in (int, float) or not 0 < value < math.inf:
        raise ValueError(f"rescale_factor is {quoted(value)}; expected a number above 0")
    return float(value)


def _channels(named: Mapping[str, Any], key: str, default: Channels) -> Channels:
    value = named.get(key)
    if value is None:
        return default
    three = isinstance(value, list) and [type(each) in (int, float) for each in value] == [True] * 3
    if not three or (key == "image_std" and min(value) <= 0):
        raise ValueError(f"{key} is {quoted(value)}; expected a number for each of three channels")
    return (float(value[0]), float(value[1]), float(value[2]))
