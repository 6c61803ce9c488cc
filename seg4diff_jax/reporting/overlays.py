"""Draws segmentations as pictures: masks over the image with a legend, heat maps, and contact sheets."""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import cache
from typing import NamedTuple

import numpy as np
from jaxtyping import Bool, Float, Int, Shaped, UInt8
from PIL import Image, ImageDraw, ImageFilter, ImageFont
from scipy.ndimage import distance_transform_cdt

from seg4diff_jax.reporting.colors import PALETTE_SIZE, class_colors, heat_colors, ink_on, palette

LONGEST, SHORTEST_LONG_SIDE = 2048, 896
"""Largest and smallest longer side of the shown image, in pixels. Larger images are shrunk, smaller ones enlarged."""
PAPER, INK, FAINT = (255, 255, 255), (20, 20, 20), (150, 150, 150)
MASK_OPACITY = 0.5
CELL_LONGEST = 448
"""Pixels along the longer side of a heat map on a sheet."""
SHEET_LONGEST = 4096
"""Most pixels along the longer side of a sheet."""


def save_labels(path, labels: Int[np.ndarray, "height width"], classes: int) -> None:
    """Writes a PNG whose pixel values are class indices, with a palette of the classes' colours.

    With more than 256 classes it is a grey image of 16 bits.
    """
    if classes > PALETTE_SIZE:
        Image.fromarray(labels.astype(np.uint16)).save(path)
        return
    image = Image.fromarray(labels.astype(np.uint8))
    image.putpalette(palette().tobytes())
    image.save(path)


def shares(labels: Int[np.ndarray, "height width"], classes: int) -> Float[np.ndarray, " classes"]:
    """Returns each class's share of the pixels. The shares add up to 1."""
    return np.bincount(labels.ravel(), minlength=classes) / labels.size


def display_size(height: int, width: int) -> tuple[int, int]:
    """Returns the height and width at which an image is shown: its own, unless it is too small or too large."""
    longer = max(height, width)
    scale = min(max(longer, SHORTEST_LONG_SIDE), LONGEST) / longer
    return max(1, round(height * scale)), max(1, round(width * scale))


def overlay(
    pixels: UInt8[np.ndarray, "height width 3"], labels: Int[np.ndarray, "height width"], classes: Sequence[str]
) -> Image.Image:
    """Draws translucent, outlined masks over the image, with class names on them and a legend of all classes.

    The image is shown at `display_size`. The legend is below it, or to the right of an image that is taller than wide.
    """
    colors, size = class_colors(len(classes)), text_size(*display_size(*labels.shape))
    rows = _legend_rows(classes, shares(labels, len(classes)))
    return _with_legend(masked_picture(pixels, labels, classes), rows, colors, size)


def masked_picture(
    pixels: UInt8[np.ndarray, "height width 3"], labels: Int[np.ndarray, "height width"], classes: Sequence[str]
) -> Image.Image:
    """Draws translucent, outlined masks over the image at `display_size`, with class names on them."""
    height, width = display_size(*labels.shape)
    shown = np.asarray(Image.fromarray(pixels).resize((width, height), Image.Resampling.LANCZOS), np.float32)
    wanted = Image.fromarray(labels.astype(np.int32)).resize((width, height), Image.Resampling.NEAREST)
    regions = np.asarray(wanted)
    colors = class_colors(len(classes))
    masked = (1 - MASK_OPACITY) * shown + MASK_OPACITY * colors[regions]
    unit = max(1, round(max(height, width) / 700))
    inner, line = _borders(regions, unit)
    masked[inner] = colors[regions[inner]]
    masked[line] = 255
    picture = Image.fromarray(np.round(masked).astype(np.uint8))
    _write_names(picture, regions, classes, colors, text_size(height, width))
    return picture


def text_size(height: int, width: int) -> int:
    """Returns a font size, in pixels, that is easy to read when the picture fills a screen."""
    return max(16, round(min(max(height, width) / 48, math.sqrt(height * width) / 28)))


def _borders(
    regions: Int[np.ndarray, "height width"], unit: int
) -> tuple[Bool[np.ndarray, "height width"], Bool[np.ndarray, "height width"]]:
    """Returns the pixels within two units of another region, and the thin line between regions."""
    edge = np.zeros(regions.shape, bool)
    edge[:, 1:] |= regions[:, 1:] != regions[:, :-1]
    edge[1:] |= regions[1:] != regions[:-1]
    grown = lambda reach: np.asarray(Image.fromarray(edge).convert("L").filter(ImageFilter.MaxFilter(2 * reach + 1)))
    return grown(2 * unit) > 0, edge if unit == 1 else grown(unit // 2) > 0


# ---- names on the masks ---------------------------------------------------------------------------------------------


def _write_names(
    picture: Image.Image,
    regions: Int[np.ndarray, "height width"],
    classes: Sequence[str],
    colors: UInt8[np.ndarray, "classes 3"],
    size: int,
) -> None:
    """Writes each class's name in the middle of the widest part of its mask, if there is room; large masks first."""
    draw, font = ImageDraw.Draw(picture), _font(size)
    taken: list[tuple[float, float, float, float]] = []
    area = np.bincount(regions.ravel(), minlength=len(classes))
    for index in map(int, np.argsort(-area, kind="stable")):
        x, y, reach = innermost(regions == index)
        text = shortened(classes[index], font, max(6 * size, 3 * reach))
        half_width, half_height = font.getlength(text) / 2 + size / 3, 0.75 * size
        x = min(max(x, half_width), picture.width - half_width)
        y = min(max(y, half_height), picture.height - half_height)
        box = (x - half_width, y - half_height, x + half_width, y + half_height)
        apart = all(box[2] < b[0] or b[2] < box[0] or box[3] < b[1] or b[3] < box[1] for b in taken)
        if reach < 0.75 * size or not apart:
            continue
        taken.append(box)
        draw.rounded_rectangle(box, radius=size / 4, fill=_ink(colors[index]))
        draw.text((x, y), text, fill=ink_on(colors[index]), font=font, anchor="mm")


def innermost(mask: Bool[np.ndarray, "height width"], detail: int = 128) -> tuple[float, float, float]:
    """Returns a point of a mask that is far from its edges, and its distance from them: (x, y, distance), in pixels.

    The distance is in steps along rows and columns; it is 0 for an empty mask. The mask is subsampled to at most
    `detail` pixels along its longer side.
    """
    step = max(1, math.ceil(max(mask.shape) / detail))
    framed = np.pad(mask[step // 2 :: step, step // 2 :: step], 1)
    distance = np.asarray(distance_transform_cdt(framed, metric="taxicab"))
    reach = distance.max()
    if not reach:
        return 0.0, 0.0, 0.0
    rows, columns = np.nonzero(distance == reach)
    middle = np.argmin((rows - rows.mean()) ** 2 + (columns - columns.mean()) ** 2)
    return (columns[middle] - 0.5) * step, (rows[middle] - 0.5) * step, float(reach * step)


# ---- the legend -----------------------------------------------------------------------------------------------------


class LegendRow(NamedTuple):
    """One class in the legend: its name, its share of the pixels as text, and whether it has any pixel."""

    name: str
    share: str
    present: bool


def _legend_rows(classes: Sequence[str], parts: Float[np.ndarray, " classes"]) -> list[LegendRow]:
    return [LegendRow(name, percent(part), part > 0) for name, part in zip(classes, parts, strict=True)]


def percent(part: float) -> str:
    """Formats a share as percent. A share above 0 is never shown as 0.0 %."""
    return "<0.1 %" if 0 < part < 0.0005 else f"{100 * part:.1f} %"


def _with_legend(
    picture: Image.Image, rows: list[LegendRow], colors: UInt8[np.ndarray, "classes 3"], size: int
) -> Image.Image:
    """Adds the legend below the picture, or to its right if it is taller than wide, on a white background."""
    font, gap = _font(size), size // 2
    share_width = font.getlength("100.0 %")
    fixed = 2 * size + share_width + gap  # the patch of colour, the share, and the space around them
    name_width = max(font.getlength(tidy(row.name)) for row in rows)
    upright = picture.height > picture.width
    room = (24 * size if upright else picture.width - 2 * gap) - fixed
    cell = math.ceil(fixed + min(name_width, room)) + gap
    line = round(1.6 * size)
    if upright:
        lines = max(1, min(len(rows), (picture.height - 2 * gap) // line))
    else:
        lines = math.ceil(len(rows) / max(1, (picture.width - gap) // cell))
    columns = math.ceil(len(rows) / lines)
    left, top = (picture.width + gap, gap) if upright else (gap, picture.height + gap)
    right = left + columns * cell
    canvas = Image.new("RGB", (max(picture.width, right), max(picture.height, top + lines * line + gap)), PAPER)
    canvas.paste(picture)
    draw = ImageDraw.Draw(canvas)
    for index, row in enumerate(rows):
        x, y = left + index // lines * cell, top + index % lines * line + line // 2
        ink = INK if row.present else FAINT
        draw.rectangle((x, y - size // 2, x + size, y + size // 2), fill=_ink(colors[index]), outline=INK)
        name = shortened(row.name, font, cell - gap - fixed)
        draw.text((x + 1.5 * size, y), name, fill=ink, font=font, anchor="lm")
        draw.text((x + cell - gap - size // 2, y), row.share, fill=ink, font=font, anchor="rm")
    return canvas


# ---- heat maps ------------------------------------------------------------------------------------------------------


def heat_picture(
    pixels: UInt8[np.ndarray, "height width 3"], scores: Float[np.ndarray, "rows columns"], longest: int = LONGEST
) -> Image.Image:
    """Draws a map of scores in colour over the image in dim grey. Colours span the map's own range of scores.

    Args:
      longest: most pixels of the picture's longer side.
    """
    height, width = display_size(*pixels.shape[:2])
    scale = min(1, longest / max(height, width))
    size = max(1, round(width * scale)), max(1, round(height * scale))
    least, greatest = float(scores.min()), float(scores.max())
    unit = (scores.astype(np.float32) - least) / max(greatest - least, np.finfo(np.float32).tiny)
    heat = np.asarray(Image.fromarray(unit).resize(size, Image.Resampling.BILINEAR))[..., None]
    grey = np.asarray(Image.fromarray(pixels).convert("L").resize(size, Image.Resampling.LANCZOS), np.float32)
    opacity = 0.45 + 0.4 * heat
    blended = (1 - opacity) * 0.8 * grey[..., None] + opacity * heat_colors(heat[..., 0])
    return Image.fromarray(np.round(blended).clip(0, 255).astype(np.uint8))


def heat_sheet(
    pixels: UInt8[np.ndarray, "height width 3"],
    maps: Sequence[tuple[str, Float[np.ndarray, "rows columns"], Image.Image]],
    columns: int | None = None,
) -> Image.Image:
    """The image and heat maps of it, each under its name with its least and its greatest score in percent.

    Args:
      maps: name, scores and `heat_picture` of each, all of one size.
      columns: maps in a row; the image then has a row of its own. Default: as `contact_sheet` lays out.
    """
    cells = [
        (name, f"{100 * scores.min():.2g} to {100 * scores.max():.2g} %", picture) for name, scores, picture in maps
    ]
    image = Image.fromarray(pixels).resize(cells[0][2].size, Image.Resampling.LANCZOS)
    if columns is None:
        return contact_sheet([("image", "least to greatest:", image), *cells])
    blank = ("", "", Image.new("RGB", image.size, PAPER))
    return contact_sheet([("image", "least to greatest:", image), *[blank] * (columns - 1), *cells], columns=columns)


def contact_sheet(
    cells: Sequence[tuple[str, str, Image.Image]], longest: int = SHEET_LONGEST, columns: int | None = None
) -> Image.Image:
    """Lays out pictures of one size in rows.

    Args:
      cells: title (dark, at the left), remark (faint, at the right) and picture of each cell.
      longest: most pixels of the sheet's longer side.
      columns: cells in a row. Default: as many as give the sheet about the shape of a screen.
    """
    width, height = cells[0][2].size
    if columns is None:
        columns = min(len(cells), max(1, round(math.sqrt(len(cells) * 1.5 * height / width))))
    rows = math.ceil(len(cells) / columns)
    size = max(13, round(max(width / 26, min(columns * width / 100, width / 14))))
    gap, title = size, round(1.8 * size)
    sheet = Image.new("RGB", (columns * (width + gap) + gap, rows * (height + title) + gap), PAPER)
    draw, font, small = ImageDraw.Draw(sheet), _font(size), _font(round(0.8 * size))
    for index, (name, remark, picture) in enumerate(cells):
        x, y = gap + index % columns * (width + gap), index // columns * (height + title)
        sheet.paste(picture, (x, y + title))
        base = y + title - round(0.5 * size)
        draw.text((x + width, base), remark, fill=FAINT, font=small, anchor="rs")
        room = width - small.getlength(remark) - size
        draw.text((x, base), shortened(name, font, room), fill=INK, font=font, anchor="ls")
    if max(sheet.size) > longest:
        sheet.thumbnail((longest, longest), Image.Resampling.LANCZOS)
    return sheet


# ---- text -----------------------------------------------------------------------------------------------------------


@cache
def _font(size: int) -> ImageFont.FreeTypeFont:
    font = ImageFont.load_default(size=size)
    assert isinstance(font, ImageFont.FreeTypeFont), "this Pillow is built without FreeType"
    return font


def tidy(text: str) -> str:
    """Returns the text on one line, with single spaces."""
    return " ".join(text.split())


def shortened(text: str, font: ImageFont.FreeTypeFont, room: int | float) -> str:
    """Returns the text on one line. If it is wider than `room` pixels, it is cut and ends with an ellipsis."""
    text = tidy(text)
    if font.getlength(text) <= room:
        return text
    while text and font.getlength(text + "...") > room:
        text = text[:-1]
    return text.rstrip() + "..."


def _ink(color: Shaped[np.ndarray, 3]) -> tuple[int, int, int]:
    return int(color[0]), int(color[1]), int(color[2])
