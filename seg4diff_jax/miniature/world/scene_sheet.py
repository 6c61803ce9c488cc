"""Draws a sheet of synthetic scenes: each picture beside its labels, above its caption."""

from __future__ import annotations

import textwrap
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from seg4diff_jax.miniature.world.shapes import CLASSES, Scene
from seg4diff_jax.reporting.colors import class_colors, ink_on
from seg4diff_jax.reporting.overlays import innermost

COLUMNS, MOST = 3, 9
POOL = 60
"""Number of scenes from which a sheet is chosen; more are not needed."""
SIDE = 256
"""Side of a scene on the sheet, in pixels."""
LETTER, GAP = 14, 10
PAPER, INK = (255, 255, 255), (20, 20, 20)


def write_sheet(file: str | Path, scenes: Sequence[Scene]) -> None:
    """Writes a sheet of up to `MOST` scenes, chosen to show all classes. Class names are written on the labels."""
    shown = _showing_all_classes(scenes)
    font = ImageFont.load_default(LETTER)
    width, height = 2 * SIDE + 2 * GAP, SIDE + 2 * LETTER + 3 * GAP
    rows = -(-len(shown) // COLUMNS)
    sheet = Image.new("RGB", (min(COLUMNS, len(shown)) * width + GAP, rows * height + GAP), PAPER)
    draw = ImageDraw.Draw(sheet)
    for index, scene in enumerate(shown):
        x, y = GAP + index % COLUMNS * width, GAP + index // COLUMNS * height
        sheet.paste(Image.fromarray(scene.image).resize((SIDE, SIDE), Image.Resampling.NEAREST), (x, y))
        sheet.paste(_label_picture(scene, font), (x + SIDE, y))
        lines = textwrap.wrap(scene.caption, 2 * SIDE // 7)
        draw.multiline_text((x, y + SIDE + GAP // 2), "\n".join(lines[:2]), fill=INK, font=font)
    Path(file).parent.mkdir(parents=True, exist_ok=True)
    sheet.save(file, optimize=True)


def _showing_all_classes(scenes: Sequence[Scene]) -> list[Scene]:
    """Chooses scenes that together show all classes: each time the scene with the most new classes."""
    pool = list(scenes)
    chosen: list[Scene] = []
    seen: set[int] = set()
    while pool and len(chosen) < MOST:
        new = [len(set(scene.classes) - seen) for scene in pool]
        chosen.append(pool.pop(int(np.argmax(new))))
        seen.update(chosen[-1].classes)
    return chosen


def _label_picture(scene: Scene, font: ImageFont.FreeTypeFont | ImageFont.ImageFont) -> Image.Image:
    colors = class_colors(len(CLASSES))
    picture = Image.fromarray(colors[scene.labels]).resize((SIDE, SIDE), Image.Resampling.NEAREST)
    draw, scale = ImageDraw.Draw(picture), SIDE / scene.labels.shape[0]
    for index in scene.classes:
        x, y, _ = innermost(scene.labels == index)
        place = np.clip((scale * x, scale * y), 1.5 * LETTER, SIDE - 1.5 * LETTER)
        draw.text(
            (float(place[0]), float(place[1])), CLASSES[index], fill=ink_on(colors[index]), font=font, anchor="mm"
        )
    return picture
