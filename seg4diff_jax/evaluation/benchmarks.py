"""What is evaluated on: named sources of labelled images, and which classes are reported apart."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from convert.staging import staged_directory
from seg4diff_jax.data.folder import LabelledFolder
from seg4diff_jax.data.loader import Source
from seg4diff_jax.data.shapes import CLASSES, STUFFS, THINGS, scene, write_folder


@dataclass(frozen=True)
class Benchmark:
    """Labelled images whose labels are indices into `classes`, or 255.

    Attributes:
      name: as results call it.
      source: items with `image`, `labels` and `name`.
      groups: classes whose mean IoU is reported apart.
      where: where the images lie.
    """

    name: str
    classes: tuple[str, ...]
    source: Source
    groups: Mapping[str, Sequence[int]] = field(default_factory=dict)
    where: str = ""


def folder_benchmark(root: str | Path, name: str | None = None) -> Benchmark:
    """A folder of the layout that `data.folder` describes; of the synthetic world, things and stuffs are told apart.

    Raises FolderError when it is not of that layout.
    """
    source = LabelledFolder(root)
    groups: dict[str, Sequence[int]] = {}
    if source.classes == CLASSES:
        groups = {"things": range(len(THINGS)), "stuffs": range(len(THINGS), len(THINGS) + len(STUFFS))}
    return Benchmark(name or source.root.resolve().name, source.classes, source, groups, str(source.root))


def scenes_benchmark(count: int, size: int, split: str = "test", cache: Path | None = None) -> Benchmark:
    """Synthetic scenes of a split, as a folder on the disk that is written first if it is absent.

    Args:
      size: side of the pictures in pixels.
      cache: directory for such folders. Default: in the user's cache.

    Raises ValueError when there are none, or they are too small.
    """
    if count < 1:
        raise ValueError(f"--data.scenes is {count}: expected at least 1")
    cache = cache or Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "seg4diff-jax" / "scenes"
    root = cache / f"{split}-{count}-of-{size}-pixels-{_world(size)}"
    if not root.is_dir():
        with staged_directory(root) as work:
            write_folder(work, (scene(split, index, size) for index in range(count)))
    return folder_benchmark(root, f"synthetic {split} scenes ({size} px)")


def _world(size: int) -> str:
    """Changes when the world does, so that former scenes are not taken for those of today."""
    digest = hashlib.sha256()
    for index in range(4):
        shown = scene("test", index, size)
        digest.update(shown.image.tobytes() + shown.labels.tobytes())
    return digest.hexdigest()[:8]
