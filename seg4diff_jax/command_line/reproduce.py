"""`seg4diff reproduce --model MODEL`: the whole paper in small, on one page, each finding beside what is found here."""

from __future__ import annotations

from importlib import import_module
from typing import Any

from jsonargparse import ArgumentParser

from seg4diff_jax.command_line.segment import model_arguments

PROMPTS, IMAGES = 16, 120


def arguments(parser: ArgumentParser) -> None:
    add: Any = parser.add_argument
    add("--data.name", type=str, help="labelled images, as for evaluate; default: the miniature's scenes")
    add("--data.root", type=str, metavar="DIR", help="where they are; without a name: images/, labels/, classes.txt")
    add("--data.split", type=str, help="of a set that has several")
    add("--prompts", type=str, metavar="FILE", help="a prompt a line; default: captions of the miniature's scenes")
    add("--count", type=int, default=PROMPTS, help="prompts that are used, the first of them")
    add("--images", type=int, default=IMAGES, help="labelled images that are used, the first of them")
    add("--seeds", type=int, default=3, help="seeds of the noise, where one figure takes several")
    add(
        "--clip",
        type=str,
        metavar="MODEL",
        help="what scores pictures; default: the checkpoint's own image_encoder",
    )
    add("--dino", type=str, metavar="MODEL", help="what else scores them; default: nothing")
    add("--batch", type=int, default=8, help="images at a time")
    add("--plan", action="store_true", help="say what the run needs, and end")
    add("--out", type=str, help="directory for the page; default: runs/reproduce/<model>-<time>")
    add("--overwrite", action="store_true", help="replace files of an earlier run in --out")
    add("--resume", action="store_true", help="go on with the interrupted run in --out")
    model_arguments(parser)


def run(options: Any) -> None:
    import_module("seg4diff_jax.command_line.reproduction").run(
        options
    )  # its training, plots and pages are of an extra
