"""Scores the model on held-out labelled pictures: zero-shot mIoU and velocity loss, with adapters and without.

These scores show whether training helps. Pictures are squashed to the model's square and scored at that size. For
scores at the labels' own size, by a named protocol, see `evaluate.py`.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from seg4diff_jax.checked import Checked
from seg4diff_jax.data.crops import View
from seg4diff_jax.data.loader import Batch, Item, evaluation_batches
from seg4diff_jax.flow import image_noise
from seg4diff_jax.magnet.encoded_items import conditioning, encoded
from seg4diff_jax.magnet.items import MaskData, Pictures, Subset, ViewItems, open_pictures, prompt_ids, subset
from seg4diff_jax.models.encoders import Encoders, TokenIds
from seg4diff_jax.models.lora import remove_lora
from seg4diff_jax.models.sd3.model import MMDiT
from seg4diff_jax.parallel import on_host
from seg4diff_jax.passes import NoisedImages
from seg4diff_jax.segmentation.metrics import IGNORED, mean_iou
from seg4diff_jax.text import Tokenizers
from seg4diff_jax.training.mask_scores import confusions


@dataclass(frozen=True)
class HeldOutData(Checked):
    """Which pictures are held out and scored. Prompts are made as in training: data.names and data.rows apply here too.

    Attributes:
      name: name of the set, as for `MaskData`; null: the training data's set. If that set is a folder, its held-out
        pictures are removed from the training data.
      root: directory of the pictures, as for `MaskData`.
      split: split of the set, as for `MaskData`; null: val of a published set, validation of scenes.
      labels: which labels to use, as for `MaskData`.
      count: number of pictures, evenly spread over the set; 0: none.
      batch_size: pictures per batch.
      sigmas: noise levels of further velocity losses, beside the expert step's noise level.
    """

    name: str | None = None
    root: str | None = None
    split: str | None = None
    labels: str | None = None
    count: int = 64
    batch_size: int = 4
    sigmas: tuple[float, ...] = ()

    def problems(self) -> list[str]:
        """Returns a sentence for each option that does not fit."""
        found = []
        if self.batch_size < 1 or self.count < 0:
            found.append(
                f"held_out.batch_size is {self.batch_size} and held_out.count {self.count}; expected at least 1 and 0"
            )
        if not all(0 <= sigma <= 1 for sigma in self.sigmas):
            found.append(f"held_out.sigmas are {list(self.sigmas)}; noise levels are 0 (clean) to 1")
        return found

    def none_of(self, data: MaskData) -> bool:
        """Whether no pictures are scored. Masks without names cannot be scored."""
        return self.count < 1 or (self.name is None and self.root is None and data.name == "sa1b")


def open_both(data: MaskData, held: HeldOutData, size: int) -> tuple[Pictures, Pictures | None]:
    """Returns the pictures to train on and the pictures to score. No picture is in both.

    Raises:
      FolderError, ValueError: as `open_pictures`; also when a folder would have no pictures left to train on, or when
        both sets are the same.
    """
    train = open_pictures(data, size)
    if held.none_of(data):
        return train, None
    if held.name is None and held.root is None and data.name == "folder":
        if given := [name for name in ("split", "labels") if getattr(held, name) is not None]:
            raise ValueError(f"held_out.{given[0]} is given, and a folder has none: leave it out")
        chosen = _spread(len(train.source), held.count)
        rest = sorted({*range(len(train.source))} - {*chosen})
        if not rest:
            raise ValueError(
                f"held_out.count is {held.count} and {data.root} has {len(train.source)} pictures: nothing is left to "
                "train on; hold out fewer, or give held_out.root a folder of its own"
            )
        return subset(train, rest), subset(open_pictures(replace(data, captions=None), size), chosen)
    name = held.name or data.name
    labels = held.labels or (data.labels if name == data.name else None)
    split = held.split or {"folder": None, "scenes": "validation"}.get(name, "val")
    root = None if name == "scenes" else held.root or (data.root if name == data.name else None)
    other = replace(data, name=name, root=root, split=split, labels=labels, captions=None, list=None)
    if _place(other) == _place(data):
        raise ValueError(
            f"held_out names the pictures that are trained on ({name}, {root or 'drawn'}, {split or 'all'}): give it "
            "another split or root" + ("; without either, some of the folder are held out" if name == "folder" else "")
        )
    pictures = open_pictures(replace(other, scenes=held.count), size)
    if pictures.classes is None:
        raise ValueError("held_out.name is 'sa1b', whose masks have no names: give a labelled set to score on, or none")
    return train, subset(pictures, _spread(len(pictures.source), held.count))


def _place(data: MaskData) -> tuple[str, Path | None, str | None]:
    """Returns the set, root and split of pictures. The choice of labels does not change where pictures are."""
    split = None if data.name == "folder" else data.split or "train"
    return data.name, None if data.root is None else Path(data.root).resolve(), split


def _spread(total: int, count: int) -> list[int]:
    return np.unique(np.linspace(0, total - 1, min(total, count)).astype(int)).tolist()


class WholePictures:
    """A data source of whole pictures, each squashed to the model's square."""

    def __init__(self, pictures: Pictures, items: ViewItems):
        self.pictures, self.items = pictures, items

    def __len__(self) -> int:
        return len(self.pictures.source)

    def __getitem__(self, index: int, /) -> Item:
        item = self.pictures.source[index]
        return self.items.seen(item, View.of(item["image"].shape[:2], "squash"))


class HeldOut:
    """Scores a model on held-out pictures. Pictures are encoded once, at first use.

    Args:
      pictures: labelled pictures.
      block, sigma: the expert block, whose attention gives the masks, and the noise level of its input.
    """

    def __init__(self, pictures: Pictures, items: ViewItems, config: HeldOutData, *, block: int, sigma: float):
        assert pictures.classes is not None
        self.source, self.classes, self.config = WholePictures(pictures, items), len(pictures.classes), config
        self.block, self.sigmas = block, (sigma, *config.sigmas)
        self._batches: list[tuple[Batch, int]] = []
        self._base: dict[str, float] = {}

    def encode(self, encoders: Encoders) -> None:
        if self._batches:
            return
        size = self.config.batch_size
        items = [
            {name: values[row] for name, values in batch.items()}
            for batch in encoded(encoders, self.source, size, both=False)
            for row in range(len(batch["latents"]))
        ]
        once = [{**item, "latents": item["latents"][0]} for item in items]
        self._batches = list(evaluation_batches(Subset(once, range(len(once))), size))

    def __call__(self, transformer: MMDiT) -> dict[str, float]:
        """Returns `miou` (percent) and `velocity_loss` with adapters, `base_miou` and `base_velocity_loss` without.

        The mIoU is NaN where the loss is not finite: with scores of NaN, every pixel would get the first class. Scores
        without adapters do not change, so they are computed once.
        """
        self._base = self._base or self.scores(remove_lora(transformer))
        return self.scores(transformer) | {f"base_{name}": value for name, value in self._base.items()}

    def scores(self, transformer: MMDiT) -> dict[str, float]:
        confusion: np.ndarray = np.zeros((self.classes, self.classes), np.int64)
        losses: list[np.ndarray] = []
        for batch, count in self._batches:
            noise = image_noise(0, batch["index"], batch["latents"].shape[1:])
            counted = (np.arange(len(batch["labels"])) < count)[:, None, None]
            batch = {**batch, "labels": np.where(counted, batch["labels"], np.uint8(IGNORED))}
            for number, sigma in enumerate(self.sigmas):
                level = jnp.float32(sigma)
                matrix, loss = _score(transformer, batch, noise, level, self.classes, self.block)
                losses.append(on_host(loss)[:count])
                confusion += on_host(matrix).astype(np.int64) * (number == 0)
        loss = float(np.concatenate(losses).mean())
        return {"miou": 100 * mean_iou(confusion) if np.isfinite(loss) else float("nan"), "velocity_loss": loss}

    def prompts(self, tokenizers: Tokenizers, count: int) -> tuple[TokenIds, TokenIds]:
        """Returns token ids of the first `count` pictures' prompts, and of the empty prompt."""
        shown = [self.source[index] for index in range(min(count, len(self.source)))]
        empty = prompt_ids(tokenizers, "")
        ids = lambda items: TokenIds(*(np.stack([item[name] for item in items]) for name in ("clip_l", "clip_g")))
        return ids(shown), ids([empty])


@partial(jax.jit, static_argnames=("classes", "block"))
def _score(
    transformer: MMDiT,
    batch: Batch,
    noise: Float[Array, "batch rows columns channels"],
    sigma: Float[Array, ""],
    classes: int,
    block: int,
) -> tuple[Int[Array, "classes classes"], Float[Array, " batch"]]:
    clip_tokens = batch["averaging"].shape[-1]
    texts = conditioning(batch, transformer.config.joint_attention_dim, clip_tokens)
    images = NoisedImages(batch["latents"].astype(jnp.float32), noise, sigma)
    matrices, loss = confusions(transformer, images, texts, batch, classes=classes, blocks=(block,))
    return matrices[0], loss
