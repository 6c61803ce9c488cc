"""Masks of a picture's words from the run that generates it: the attention of one of its steps, without another pass.

The prompt's words are the classes. What is read is what `Pipeline.segment` reads of a noised image, and is upsampled in
the same way.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from jaxtyping import Float, Int, UInt8

from seg4diff_jax.batching import finite_maps, one_for_each
from seg4diff_jax.class_names import list_for_each, one_word, warn_of_single
from seg4diff_jax.flow import is_whole
from seg4diff_jax.models.kernels import Kernel
from seg4diff_jax.models.sd3.model import MMDiT
from seg4diff_jax.models.vae import VAE
from seg4diff_jax.parallel import on_host
from seg4diff_jax.passes import MEAN_PROBS, finite_pictures
from seg4diff_jax.prompt_attention import spelled, text_columns
from seg4diff_jax.sampling import GeneratingRun, Looking, sample_looking
from seg4diff_jax.segmentation.open_vocabulary import Segmentation, upsampled_labels
from seg4diff_jax.text import Tokenizers

STEPS = 28
"""The steps that a checkpoint's expert step is counted in."""


def mask_step(at_step: int | None, expert_step: int, steps: int, taken: int | None = None) -> int:
    """Returns the number of the step that masks are read in: 1 is the last one, at the clean end, `steps` pure noise.

    Args:
      at_step: that number, or None: the checkpoint's expert step, as far along a run of `steps` as it is along 28; or
        the first step, if the run starts from an image after it.
      taken: how many steps the run takes, where it starts from an image. Default: all.

    Raises ValueError if the run has no such step.
    """
    first = steps if taken is None else taken
    chosen = max(1, min(first, round(expert_step * steps / STEPS))) if at_step is None else at_step
    if not is_whole(chosen, 1, first):
        raise ValueError(f"at_step is {chosen!r}; expected a whole number, 1 (the last step) to {first} (the first)")
    return int(chosen)


def refuse_unread(block: int | None, at_step: int | None) -> None:
    """Raises ValueError if a block or a step to read is named where no masks are asked for."""
    if block is not None or at_step is not None:
        raise ValueError("block and at_step say where masks are read: name words of the prompt with segment=")


class Words(NamedTuple):
    """The words of a picture's prompt that get masks, and the columns of each among CLIP's tokens."""

    prompt: str
    names: tuple[str, ...]
    columns: tuple[Int[np.ndarray, " columns"], ...]


def prompt_words(
    tokenizers: Tokenizers,
    prompts: str | Sequence[str],
    segment: Sequence[str] | Sequence[Sequence[str]],
    images_per_prompt: int = 1,
) -> list[Words]:
    """Returns the words of each picture. Arguments are as for `Pipeline.generate`.

    Raises:
      TypeError: names are not strings in a list.
      ValueError: there are more or fewer lists than prompts; a list is empty or repeats a name; or a name is no word of
        its prompt, nor several that follow one another, or is cut off.

    Warns (`class_names.OneClassWarning`) of a list of a single name, which takes every pixel.
    """
    single = isinstance(prompts, str)
    each = [prompts] if single else list(prompts)
    if isinstance(segment, str):
        raise TypeError(f"expected a list of words of the prompt, found the string {segment!r}; write [{segment!r}]")
    lists = list_for_each(segment, len(each), "prompts", single)
    found = [words_of(tokenizers, prompt, names) for prompt, names in zip(each, lists, strict=True)]
    warn_of_single(map(one_word, lists), stacklevel=5)
    return one_for_each(found, images_per_prompt)


def words_of(tokenizers: Tokenizers, prompt: str, names: Sequence[str]) -> Words:
    """Finds all places of each name in a prompt. Raises as `prompt_words` does."""
    if isinstance(names, str) or not all(isinstance(name, str) for name in names):
        raise TypeError(f"expected a list of words of the prompt {prompt!r}, found {names!r}")
    if not len(names):
        raise ValueError(f"the list of words of the prompt {prompt!r} is empty: expected at least one")
    length = tokenizers.clip_l.model_max_length
    text = text_columns(tokenizers, prompt, (("clip", length),), (0, length))
    columns = tuple(text.named(name) for name in names)
    same = [spelled(name) for name in names]
    if again := [name for place, name in enumerate(names) if same[place] in same[:place]]:
        raise ValueError(f"{again[0]!r} is repeated in the list of words; give each once")
    return Words(prompt, tuple(names), columns)


def pictures_with_masks(
    transformer: MMDiT,
    vae: VAE,
    run: GeneratingRun,
    words: Sequence[Words],
    looking: Looking,
    kernel: Kernel | None = None,
) -> list[tuple[UInt8[np.ndarray, "height width 3"], Segmentation]]:
    """Returns the pictures of a run, each with the segmentation into its words.

    Args:
      words: of each picture.
      looking: the one block and the one step that are read.

    Raises:
      ValueError: as `sampling.sample_looking`.
      FloatingPointError: pixels or scores are not finite: damaged weights.
    """
    latents, records = sample_looking(transformer, run, MEAN_PROBS, looking=looking, kernel=kernel)
    pictures, (block,) = finite_pictures(vae, latents), looking.blocks
    maps, patch = finite_maps(on_host(records[block].probs)[0], block), transformer.config.patch_size
    grid = run.latents.shape[1] // patch, run.latents.shape[2] // patch
    each = zip(pictures, maps, words, strict=True)
    return [(picture, segmented(own, grid, picture.shape[:2], of)) for picture, own, of in each]


def segmented(
    maps: Float[np.ndarray, "image_tokens text_tokens"], grid: tuple[int, int], size: tuple[int, int], words: Words
) -> Segmentation:
    """Segments a picture: each pixel goes to the name that it attends to most, by the mean over the name's columns.

    Args:
      maps: image-to-text probabilities, averaged over heads.
      grid: rows and columns of image tokens.
      size: height and width of the picture.
    """
    scores = np.stack([maps[:, columns].mean(axis=-1).reshape(grid) for columns in words.columns])
    return Segmentation(upsampled_labels(scores, size), scores, words.names, (words.prompt,))
