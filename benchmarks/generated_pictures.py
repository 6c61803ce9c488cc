"""Measures how often the miniature's CLIP ranks a generated picture's own caption first of 16.

    python benchmarks/generated_pictures.py                              # 256 captions of test scenes
    python benchmarks/generated_pictures.py --sheet docs/pictures/samples.png
    python benchmarks/generated_pictures.py --lora runs/magnet/miniature/export

For comparison it also scores the scenes that the captions describe, unchanged and through the autoencoder, and pictures
of other captions, whose expected score is chance, 1 in 16.
"""

from __future__ import annotations

import time
from pathlib import Path

import numpy as np
from jsonargparse import auto_cli
from PIL import Image
from rich.console import Console
from rich.progress import track
from rich.table import Table

import seg4diff_jax as s4d
from seg4diff_jax.analysis.clip import load_clip
from seg4diff_jax.analysis.clip_score import clip_scores, rank_accuracy
from seg4diff_jax.convert.sources.open import MINIATURE
from seg4diff_jax.miniature.world.shapes import scene
from seg4diff_jax.passes import finite_pictures

COLUMNS = 12


def main(
    model: str = str(MINIATURE),
    lora: str | None = None,
    pictures: int = 256,
    batch: int = 32,
    steps: int = 28,
    guidance: float = 4.0,
    seed: int = 0,
    sheet: str | None = None,
) -> None:
    """Generate and judge.

    Args:
      model: directory in diffusers' format, with an image_encoder.
      lora: adapters for the transformer, such as MAGNET's.
      pictures: one for each of the first test scenes' captions.
      batch: pictures at once.
      steps, guidance, seed: as for `Pipeline.generate`.
      sheet: PNG file for some of them: scenes above, pictures of their captions below.
    """
    pipe, clip = s4d.load(model, lora=lora, dtype="float32"), load_clip(model)
    size = pipe.trained_size
    scenes = [scene("test", index, size) for index in range(pictures)]
    captions = [shown.caption for shown in scenes]
    generated: list[np.ndarray] = []
    decoded: list[np.ndarray] = []
    seconds = 0.0
    for first in track(range(0, pictures, batch), "generating", console=Console(stderr=True)):
        part = slice(first, first + batch)
        start = time.perf_counter()
        generated += pipe.generate(captions[part], steps=steps, guidance=guidance, seed=seed + first)
        seconds += time.perf_counter() - start
        latents = pipe.encode_images([shown.image for shown in scenes[part]], (size, size), "square")
        decoded += finite_pictures(pipe.vae, latents)
    table = Table(
        "pictures",
        "own caption first of 16, %",
        "CLIPScore",
        title=f"{pictures} captions, {steps} steps, guidance {guidance:g}",
    )
    kinds = {
        "generated": generated,
        "the captions' scenes": [shown.image for shown in scenes],
        "the same through the autoencoder": decoded,
        "generated for other captions": generated[1:] + generated[:1],
    }
    for name, shown in kinds.items():
        similarities = clip.similarities(shown, captions)
        rank, score = float(rank_accuracy(similarities)), float(clip_scores(similarities).mean())
        table.add_row(name, f"{100 * rank:.1f}", f"{score:.1f}")
    Console().print(table, f"{pictures / seconds:.2f} pictures/s, compiling included", sep="\n")
    if sheet is not None:
        write_sheet(Path(sheet), [shown.image for shown in scenes], generated)


def write_sheet(file: Path, scenes: list[np.ndarray], generated: list[np.ndarray], rows: int = 3) -> None:
    """Rows of scenes, each above the pictures of their captions, twice as large as they are."""
    strips = []
    for row in range(rows):
        part = slice(row * COLUMNS, (row + 1) * COLUMNS)
        strips += [np.concatenate(scenes[part], axis=1), np.concatenate(generated[part], axis=1)]
        strips.append(np.full((6, *strips[-1].shape[1:]), 255, np.uint8))
    sheet = Image.fromarray(np.concatenate(strips[:-1]))
    sheet.resize((2 * sheet.width, 2 * sheet.height), Image.Resampling.NEAREST).save(file)


if __name__ == "__main__":
    auto_cli(main)
