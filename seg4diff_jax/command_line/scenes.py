"""`seg4diff scenes DIR`: writes scenes of the miniature's synthetic world as a folder of labelled images."""

from __future__ import annotations

from typing import Any

from jsonargparse import ArgumentParser

from seg4diff_jax.miniature.world.shapes import SPLITS, scene, write_folder
from seg4diff_jax.miniature.world.stuffs import SIDE


def arguments(parser: ArgumentParser) -> None:
    add: Any = parser.add_argument
    add("directory", type=str, nargs="?", help="where to write images/, labels/, classes.txt and captions.json")
    add("--split", choices=list(SPLITS), default="test", help="splits share no scene")
    add("--count", type=int, default=500, help="number of scenes")
    add("--size", type=int, default=SIDE, help="pixels along a side")
    add("--sheet", type=str, metavar="FILE", help="draw a few of the scenes with their labels on a sheet (PNG)")


def run(options: Any) -> None:
    if options.count < 1:
        raise ValueError(f"--count is {options.count}: expected at least 1")
    if options.directory is None and options.sheet is None:
        raise ValueError("expected a directory to write scenes to, or --sheet FILE")
    scenes = lambda count: (scene(options.split, index, options.size) for index in range(count))
    if options.directory is not None:
        write_folder(options.directory, scenes(options.count))
        print(f"wrote {options.count} scenes of the {options.split} split to {options.directory}")
    if options.sheet is not None:
        from seg4diff_jax.miniature.world.scene_sheet import POOL, write_sheet

        write_sheet(options.sheet, list(scenes(min(options.count, POOL))))
        print(f"wrote {options.sheet}")
