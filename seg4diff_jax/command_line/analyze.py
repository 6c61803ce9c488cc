"""`seg4diff analyze IMAGE CLASS... --find-expert --model MODEL`."""

from __future__ import annotations

import math
import os
from typing import Any

import jax.numpy as jnp
import numpy as np
from jaxtyping import Float
from jsonargparse import ArgumentParser
from rich.console import Console
from rich.table import Table

from seg4diff_jax.analysis.attention_share import text_shares, uniform_share
from seg4diff_jax.command_line.memory import TO_LOAD, explaining_full_memory
from seg4diff_jax.command_line.segment import load_shown, model_arguments, open_named
from seg4diff_jax.flow import LARGEST_SEED, check_seed, image_noise
from seg4diff_jax.images import read_image
from seg4diff_jax.passes import NoisedImages
from seg4diff_jax.pipeline import Pipeline
from seg4diff_jax.terminal import stderr_console
from seg4diff_jax.text import class_prompts

BAR = 40
"""Characters that stand for all of a block's attention."""


def arguments(parser: ArgumentParser) -> None:
    add: Any = parser.add_argument
    add("image", type=str, help="image file")
    add("classes", type=str, nargs="+", metavar="CLASS", help="what is in it: the words of the prompt")
    add("--find-expert", action="store_true", help="show how much attention each block's image tokens give to the text")
    add("--step", type=int, help="noise level: 1 (nearly clean) to 28 (pure noise); default: the checkpoint's own")
    add("--seed", type=int, default=0, help=f"of the noise: 0 to {LARGEST_SEED}")
    model_arguments(parser)


def run(options: Any) -> None:
    os.environ.setdefault("TRANSFORMERS_NO_ADVISORY_WARNINGS", "1")  # it warns that it has no PyTorch; none is needed
    console = stderr_console()
    if not options.find_expert:
        raise ValueError("say what to analyze: --find-expert")
    check_seed(options.seed)
    pixels = read_image(options.image)
    checkpoint = open_named(options)
    step = checkpoint.step(options.step)
    prompt, *more = class_prompts(checkpoint.tokenizers, options.classes).prompts
    if more:
        raise ValueError(f"{len(options.classes)} class names need {1 + len(more)} prompts; expected what fits in one")
    pipe, _, _ = load_shown(console, checkpoint, options)
    with console.status("compiling and measuring"), explaining_full_memory(TO_LOAD):
        shares, uniform = text_attention(pipe, pixels, prompt, step, options.seed)
    Console(highlight=False).print(share_table(shares, uniform, pipe.expert_block))


def text_attention(
    pipe: Pipeline, pixels: np.ndarray, prompt: str, step: int, seed: int
) -> tuple[Float[np.ndarray, "blocks heads"], float]:
    """Share of the image tokens' attention that is on text, by block and head; and that of no preference.

    The image is seen as a square of the trained size.
    """
    texts = pipe.encode_prompts([prompt])
    latents = pipe.encode_images([pixels], (pipe.trained_size, pipe.trained_size))
    noise = image_noise(seed, [0], latents.shape[1:])
    images = NoisedImages(latents, noise, jnp.float32(pipe.schedule.sigma_at(step)))
    with pipe.settings():
        shares = text_shares(pipe.transformer, images, texts)
    tokens = math.prod(images.grid(pipe.transformer.config.patch_size))
    return np.asarray(shares)[0], uniform_share(tokens, texts.full_context.shape[1])


def share_table(shares: Float[np.ndarray, "blocks heads"], uniform: float, named: int | None) -> Table:
    means = shares.mean(axis=1)
    table = Table("block", "on text", "heads", "", box=None)
    for column in table.columns[:3]:
        column.justify = "right"
    for block, (mean, heads) in enumerate(zip(means, shares, strict=True)):
        marks = ["most"] * int(block == means.argmax()) + ["the checkpoint's expert"] * int(block == named)
        bar = "█" * round(BAR * float(mean))
        style = "bold" if block == means.argmax() else ""
        table.add_row(
            str(block),
            f"{100 * mean:.1f} %",
            f"{100 * heads.min():.0f}..{100 * heads.max():.0f} %",
            " ".join([bar, *marks]),
            style=style,
        )
    table.caption = f"Attention without any preference would put {100 * uniform:.1f} % on text."
    return table
