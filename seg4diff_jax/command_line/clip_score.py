"""`seg4diff clip-score DIR [DIR] --clip MODEL`: how well generated pictures show their prompts, by CLIP."""

from __future__ import annotations

import csv
import os
import warnings
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Float
from jsonargparse import ArgumentParser

from seg4diff_jax.analysis.clip import Clip, load_clip
from seg4diff_jax.analysis.paired_difference import COVERAGE, RESAMPLES, paired_difference
from seg4diff_jax.analysis.picture_scores import clip_t
from seg4diff_jax.command_line.memory import explaining_full_memory
from seg4diff_jax.command_line.picture_directory import SCORES, Picture, read_pictures
from seg4diff_jax.images import read_image
from seg4diff_jax.quoting import counted, quoted
from seg4diff_jax.terminal import Bar, stderr_console

COLUMNS = ("file", "prompt", "CLIPScore", "100 x cosine")
ALIKE = (
    *("model", "seed", "count", "steps", "guidance", "sampler", "negative", "size", "image", "strength"),
    *("t5", "dtype"),
)
"""Options of two runs that should be equal where adapters are compared."""


def arguments(parser: ArgumentParser) -> None:
    add: Any = parser.add_argument
    add("directory", type=str, metavar="DIR", help="pictures that seg4diff generate wrote")
    add("other", type=str, nargs="?", metavar="DIR", help="others of the same prompts, to subtract the first from")
    add(
        "--clip",
        type=str,
        required=True,
        metavar="MODEL",
        help="the CLIP that scores: a Hub id, a directory, or miniature",
    )
    add("--batch", type=int, default=32, help="pictures read and embedded at once")


def run(options: Any) -> None:
    os.environ.setdefault("TRANSFORMERS_NO_ADVISORY_WARNINGS", "1")  # else it warns that PyTorch is missing
    if options.batch < 1:
        raise ValueError(f"--batch is {options.batch}: expected at least 1")
    console = stderr_console()
    directories = [Path(each).expanduser() for each in (options.directory, options.other) if each is not None]
    records, pictures = zip(*(read_pictures(each) for each in directories), strict=True)
    order = same_order(*pictures, *directories) if len(directories) == 2 else []
    clip = load_clip(options.clip)

    found, done = [], 0
    with Bar(console, "scoring", sum(map(len, pictures))) as bar, explaining_full_memory("choose a smaller --batch"):
        for directory, own in zip(directories, pictures, strict=True):
            parts = []
            for part in cosines(clip, directory, own, options.batch):
                parts.append(part)
                bar.update(done := done + len(part))
            found.append(100 * np.concatenate(parts).astype(np.float64))
    for directory, own, scores in zip(directories, pictures, found, strict=True):
        write_scores(directory / SCORES, own, scores)
        prompts = {picture.prompt for picture in own}
        print(f"{directory}: {counted(len(own), 'picture')} of {counted(len(prompts), 'prompt')}, by {options.clip}")
        print(f"  CLIPScore, the mean of max(100 x cosine, 0): {np.maximum(scores, 0).mean():.4f}")
        print(f"  the mean of 100 x cosine: {scores.mean():.4f}")
        length = clip.text.config.max_position_embeddings
        print(f"  {counted(cut_prompts(clip, [*prompts], length), 'prompt')} cut at {length} tokens")
    if order:
        print(compared(pictures[0], found[0], found[1][order], *directories))
        if differing := remarks(*records):
            console.print(f"the two were not made alike: {differing}")
    console.print(f"wrote {', '.join(str(directory / SCORES) for directory in directories)}")


def cosines(
    clip: Clip, directory: Path, pictures: Sequence[Picture], batch: int
) -> Iterator[Float[np.ndarray, " pictures"]]:
    """Yields the cosine of each picture with its prompt, of `batch` pictures, which are read for it, at a time."""
    for start in range(0, len(pictures), batch):
        part = pictures[start : start + batch]
        pixels = [read_image(directory / picture.file) for picture in part]
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="prompt .* tokens")  # their number is said at the end
            yield clip_t(clip, pixels, [picture.prompt for picture in part], batch=batch)


def cut_prompts(clip: Clip, prompts: Sequence[str], length: int) -> int:
    """Returns how many prompts have more tokens than the text encoder reads, start and end included."""
    ids = clip.tokenizer(list(prompts), verbose=False).input_ids
    return sum(len(each) > length for each in ids)


def write_scores(file: Path, pictures: Sequence[Picture], scores: Float[np.ndarray, " pictures"]) -> None:
    with file.open("w", encoding="utf-8", newline="") as opened:
        rows = csv.writer(opened, lineterminator="\n")
        rows.writerow(COLUMNS)
        for picture, score in zip(pictures, scores.tolist(), strict=True):
            rows.writerow([*picture, f"{max(score, 0.0):.6f}", f"{score:.6f}"])


# ---- two directories ------------------------------------------------------------------------------------------------


def same_order(first: Sequence[Picture], second: Sequence[Picture], one: Path, other: Path) -> list[int]:
    """Returns, for each picture of the first, the place of the second's with that prompt and number within the prompt.

    Raises ValueError if they are not of the same prompts, or of one only.
    """
    mine, theirs = (Counter(picture.prompt for picture in each) for each in (first, second))
    if differing := [prompt for prompt in {**mine, **theirs} if mine[prompt] != theirs[prompt]]:
        prompt = differing[0]
        raise ValueError(
            f"{one} and {other} are not of the same prompts: of {quoted(prompt)} the first has "
            f"{counted(mine[prompt], 'picture')} and the second {theirs[prompt]}"
        )
    if len(mine) < 2:
        raise ValueError(f"{one} and {other} are of one prompt: an interval over prompts needs at least two")
    places = {key: place for place, key in enumerate(numbered(second))}
    return [places[key] for key in numbered(first)]


def numbered(pictures: Sequence[Picture]) -> list[tuple[str, int]]:
    """Returns the prompt of each picture, and the picture's number among those of the prompt."""
    seen: Counter[str] = Counter()
    found = []
    for picture in pictures:
        found.append((picture.prompt, seen[picture.prompt]))
        seen[picture.prompt] += 1
    return found


def compared(
    pictures: Sequence[Picture],
    first: Float[np.ndarray, " pictures"],
    second: Float[np.ndarray, " pictures"],
    one: Path,
    other: Path,
) -> str:
    """Returns what is to be said of the difference between the scores of two directories."""
    number = {prompt: place for place, prompt in enumerate(dict.fromkeys(picture.prompt for picture in pictures))}
    found = paired_difference(first, second, np.array([number[picture.prompt] for picture in pictures]))
    return (
        f"{other} minus {one}, the mean of 100 x cosine: {found.mean:+.4f}\n"
        f"  {COVERAGE} % interval {found.low:+.4f} to {found.high:+.4f}, by {RESAMPLES} resamples of "
        f"{counted(len(number), 'prompt')}: {'excludes' if found.excludes_zero else 'includes'} 0"
    )


def remarks(first: Mapping[str, Any], second: Mapping[str, Any]) -> str:
    """Returns the options in which two runs differ and should not."""
    differing = [name for name in ALIKE if first.get(name) != second.get(name)]
    return "; ".join(f"{name} {quoted(first.get(name))} and {quoted(second.get(name))}" for name in differing)
