"""The synthetic world as training data: pictures, labels and captions, drawn on demand or once into a cache."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from functools import partial
from multiprocessing import get_context
from pathlib import Path

import jax
import numpy as np
from jax.experimental import multihost_utils
from jaxtyping import UInt8

from seg4diff_jax.data.loader import DataSource, Item, live_with_parent
from seg4diff_jax.data.record_cache import RecordCache, write_cache
from seg4diff_jax.miniature.world.shapes import scene
from seg4diff_jax.text import Tokenizers, tokenize
from seg4diff_jax.training.stages import counted, stage

FIELDS = ("image", "labels", "caption")
LONGEST_CAPTION = 256
"""Number of bytes to which captions are padded."""
CHUNK = 64
"""Number of scenes that one process draws at a time."""


@dataclass(frozen=True)
class SceneConfig:
    """Size and number of the scenes, and where they are cached.

    Attributes:
      size: side of the pictures, in pixels.
      train: number of training scenes.
      validation: number of validation scenes.
      cache: directory where the training scenes are stored once drawn (66 kB each for a side of 128); null: every
        epoch draws them anew.
    """

    size: int = 128
    train: int = 1_000_000
    validation: int = 256
    cache: str | None = None


class SceneItems:
    """A data source of a split's scenes, with the given fields.

    Fields are `image` uint8 [size, size, 3], `labels` uint8 [size, size], `caption` uint8 [bytes].
    """

    def __init__(self, split: str, count: int, size: int, fields: tuple[str, ...] = FIELDS):
        self.split, self.count, self.size, self.fields = split, count, size, fields

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, index: int, /) -> Item:
        shown = scene(self.split, index, self.size)
        item = {"image": shown.image, "labels": shown.labels, "caption": _padded(shown.caption)}
        return {field: item[field] for field in self.fields}


class Mapped:
    """A data source that applies a picklable function to the items of another source."""

    def __init__(self, source: DataSource, function: Callable[[Item], Item]):
        self.source, self.function = source, function

    def __len__(self) -> int:
        return len(self.source)

    def __getitem__(self, index: int, /) -> Item:
        return self.function(self.source[index])


def training_scenes(config: SceneConfig, fields: tuple[str, ...] = FIELDS) -> DataSource:
    """Returns the training scenes. If the cache that the configuration names is absent, all cores draw it first."""
    source = SceneItems("train", config.train, config.size, fields)
    if config.cache is None:
        return source
    identity = {"split": "train", "count": config.train, "size": config.size, "sample": scene_sample(config.size)}
    scenes = lambda: counted(_drawn(config), config.train, "scenes drawn")
    make = lambda directory: write_cache(directory, scenes(), config.train, identity)
    make_once(config.cache, make, f"drawing {config.train} scenes")
    return RecordCache(config.cache, identity, fields)


def make_once(directory: str | Path, make: Callable[[Path], None], doing: str) -> None:
    """Makes a directory if it is absent. The first process makes it; then others, if they do not see it.

    Args:
      doing: name of this stage, for messages.
    """
    directory = Path(directory)
    if jax.process_index() == 0 and not directory.exists():
        with stage(f"{doing}, once, into {directory}"):
            make(directory)
    if jax.process_count() > 1:
        multihost_utils.sync_global_devices(f"made {directory}")
    if not directory.exists():
        make(directory)


def validation_scenes(config: SceneConfig, fields: tuple[str, ...] = FIELDS) -> DataSource:
    return SceneItems("validation", config.validation, config.size, fields)


def scene_sample(size: int) -> int:
    """Returns a number that changes when the synthetic world changes, so that caches of older scenes are recognised."""
    return int(sum(scene("train", index, size).image.astype(np.int64).sum() for index in range(4)))


def _drawn(config: SceneConfig) -> Iterator[Item]:
    draw = partial(_draw_chunk, config)
    spawn = get_context("spawn")
    with ProcessPoolExecutor(os.cpu_count(), mp_context=spawn, initializer=live_with_parent) as pool:
        yield from pool.map(draw, range(0, config.train, CHUNK))


def _draw_chunk(config: SceneConfig, start: int) -> Item:
    source = SceneItems("train", config.train, config.size)
    items = [source[index] for index in range(start, min(start + CHUNK, config.train))]
    return {field: np.stack([item[field] for item in items]) for field in FIELDS}


# ---- captions -------------------------------------------------------------------------------------------------------


def _padded(caption: str) -> UInt8[np.ndarray, " bytes"]:
    encoded = caption.encode()
    if len(encoded) > LONGEST_CAPTION:
        raise ValueError(f"the caption {caption!r} has {len(encoded)} bytes; there is room for {LONGEST_CAPTION}")
    return np.frombuffer(encoded.ljust(LONGEST_CAPTION, b"\0"), np.uint8)


def with_token_ids(item: Item, tokenizers: Tokenizers) -> Item:
    """Returns the item with its `caption` replaced by token ids `clip_l` and `clip_g`, int32 [tokens]."""
    caption = bytes(item["caption"]).rstrip(b"\0").decode()
    rest = {field: value for field, value in item.items() if field != "caption"}
    return {**rest, **caption_ids(tokenizers, caption)}


def caption_ids(tokenizers: Tokenizers, caption: str) -> Item:
    ids = tokenize(tokenizers, [caption])
    return {"clip_l": np.asarray(ids.clip_l)[0], "clip_g": np.asarray(ids.clip_g)[0]}


def captioned(source: DataSource, tokenizers: Tokenizers) -> DataSource:
    return Mapped(source, partial(with_token_ids, tokenizers=tokenizers))


def scene_name(split: str) -> Callable[[int], str]:
    return f"{split} scene {{}}".format
