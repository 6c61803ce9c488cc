"""Statistics of every block for pictures and their prompts: from a pass on noised pictures, or in a generating run."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import jax
import numpy as np
from jaxtyping import Float, UInt8

from seg4diff_jax.analysis.block_statistics import (
    BlockStatistics,
    StatisticsReader,
    block_statistics,
    text_share,
    uniform_shares,
)
from seg4diff_jax.analysis.token_groups import TokenGroups, token_groups
from seg4diff_jax.flow import Sampler
from seg4diff_jax.images import ImageInput
from seg4diff_jax.passes import NoisedImages, finite_pictures
from seg4diff_jax.pipeline import Pipeline
from seg4diff_jax.sampling import Looking, sample_looking


@dataclass(frozen=True)
class PromptStatistics:
    """Statistics of all blocks for several prompts, on the host.

    Attributes:
      prompts: what the text encoders were told.
      groups: names of the groups of tokens, the image's first.
      sizes: number of tokens of each group.
      blocks: see `BlockStatistics`; leading axes are prompts and blocks.
    """

    prompts: tuple[str, ...]
    groups: tuple[str, ...]
    sizes: Float[np.ndarray, "prompts groups"]
    blocks: BlockStatistics

    @property
    def text_shares(self) -> Float[np.ndarray, "prompts blocks heads"]:
        """How much of the image's attention is on text."""
        return text_share(np.asarray(self.blocks.shares))

    @property
    def uniform_text_shares(self) -> Float[np.ndarray, " prompts"]:
        """How much of its attention the image would give to text without any preference."""
        return 1 - uniform_shares(self.sizes)[:, 0]

    def on(self, *groups: str) -> Float[np.ndarray, "prompts blocks heads"]:
        """How much of the image's attention is on some groups together; 0 on groups without tokens."""
        of_image = np.asarray(self.blocks.shares)[..., 0, :]
        return of_image[..., [self.groups.index(group) for group in groups]].sum(axis=-1)

    @property
    def word_shares(self) -> Float[np.ndarray, "prompts blocks"]:
        """How much of the image's attention is on the prompt's words, mean over heads. NaN where it has none: not 0."""
        words = [self.groups.index(group) for group in self.prompt_groups]
        has_words = self.sizes[:, words].sum(axis=1, keepdims=True) > 0
        return np.where(has_words, self.on(*self.prompt_groups).mean(axis=2), np.nan)

    def value_norms(self, *groups: str) -> Float[np.ndarray, "prompts blocks"]:
        """Mean L2 norm of the values of some groups' tokens together, all heads as one vector. NaN without tokens."""
        places = [self.groups.index(group) for group in groups]
        return over_tokens(np.asarray(self.blocks.whole_value_norms)[..., places], self.sizes[:, None, places])

    @property
    def text_groups(self) -> tuple[str, ...]:
        return self.groups[1:]

    @property
    def prompt_groups(self) -> tuple[str, ...]:
        """Groups of the tokens that the prompt's words are, without start, end and padding."""
        return tuple(group for group in self.groups if group.endswith(" prompt"))


def over_tokens(
    values: Float[np.ndarray, "*lead groups"], sizes: Float[np.ndarray, "*_ groups"]
) -> Float[np.ndarray, "*lead"]:
    """Returns the mean over the tokens of all groups. Groups without tokens, whose values are NaN, do not count."""
    with np.errstate(invalid="ignore"):
        return (np.where(sizes > 0, values, 0) * sizes).sum(axis=-1) / sizes.sum(axis=-1)


def noised_squares(
    pipe: Pipeline, pictures: Sequence[ImageInput], *, step: int | None = None, seed: int = 0, first: int = 0
) -> NoisedImages:
    """Encodes pictures, each as a square of the trained size, at a noise level. Arguments as for `on_pictures`."""
    size, places = (pipe.trained_size, pipe.trained_size), list(range(first, first + len(pictures)))
    noise = pipe.view.noise(None, places, len(places), size, seed)
    latents, noise = pipe.spread((pipe.encode_images(pictures, size), noise))
    return NoisedImages(latents, noise, np.float32(pipe.schedule.sigma_at(pipe.expert_step if step is None else step)))


def on_pictures(
    pipe: Pipeline,
    pictures: Sequence[ImageInput],
    prompts: Sequence[str],
    *,
    step: int | None = None,
    seed: int = 0,
    first: int = 0,
) -> PromptStatistics:
    """Returns the statistics of all loaded blocks on noised pictures, each under its prompt, in one pass.

    Each picture is seen as a square of the trained size.

    Args:
      step: noise level, counted from the clean end of 28. Default: the checkpoint's own.
      seed: of the noise; each picture has noise of its own, by its position in its set.
      first: position of the first of these pictures in the set.

    Raises:
      ValueError: there is not one prompt for each picture, or an option is not usable.
      FloatingPointError: the statistics are not finite: damaged weights or inputs.
    """
    if len(pictures) != len(prompts):
        raise ValueError(f"{len(pictures)} pictures and {len(prompts)} prompts; expected one for each")
    images = noised_squares(pipe, pictures, step=step, seed=seed, first=first)
    texts = pipe.encode_prompts(prompts)
    groups = token_groups(pipe.tokenizers, prompts, texts)
    with pipe.settings():
        found = block_statistics(pipe.transformer, images, pipe.spread(texts), pipe.spread(groups))
    return gathered(prompts, groups, found, math.prod(images.grid(pipe.transformer.config.patch_size)))


def while_generating(
    pipe: Pipeline,
    prompts: Sequence[str],
    *,
    at_steps: Sequence[int],
    steps: int = 28,
    guidance: float = 7.0,
    seed: int = 0,
    size: tuple[int, int] | None = None,
    sampler: Sampler | None = None,
    first: int = 0,
) -> tuple[list[PromptStatistics], list[UInt8[np.ndarray, "height width 3"]]]:
    """Generates a picture of each prompt; returns the statistics of all blocks at some steps, and the pictures.

    They are of the run itself, of the half of it that follows the prompt: no picture is made or encoded twice.

    Args:
      at_steps: numbers of steps, counted as noise levels are: 1 is the last one, at the clean end, `steps` pure noise.
      steps, guidance, seed, size, sampler: as for `Pipeline.generate`.
      first: position of the first of these prompts in a list, by which the noise of its picture is drawn.

    Raises:
      ValueError: as `Pipeline.generate`; or the run has no such step, one is named twice, or none, or no prompt.
      FloatingPointError: statistics or pixels are not finite: damaged weights.
    """
    if not prompts or not at_steps:
        raise ValueError(f"{len(prompts)} prompts and {len(at_steps)} steps to look at; expected at least one of each")
    if beyond := [step for step in at_steps if not 1 <= step <= steps]:
        expected = f"expected 1 (the last) to {steps} (the first)"
        raise ValueError(f"step {beyond[0]} to look at is not of this run: {expected}")
    size = pipe.view.size((0, 0), size, "square")
    noise = np.asarray(pipe.view.noise(None, list(range(first, first + len(prompts))), len(prompts), size, seed))
    run = pipe.generating_run(prompts, steps=steps, guidance=guidance, noise=noise, size=size, sampler=sampler)
    groups = token_groups(pipe.tokenizers, prompts, run.texts)
    looking = Looking(tuple(range(pipe.transformer.depth)), tuple(steps - step for step in at_steps))
    with pipe.settings():
        reader = StatisticsReader(pipe.spread(groups).members)
        latents, records = sample_looking(pipe.transformer, run, reader, looking=looking)
        pictures = finite_pictures(pipe.vae, latents)
    patch = pipe.transformer.config.patch_size
    image_tokens = math.prod(side // patch for side in run.latents.shape[1:3])
    by_block = [records[block] for block in looking.blocks]
    stacked = jax.tree.map(lambda *blocks: np.stack(blocks, axis=2), *by_block)  # [steps, prompts, blocks, ...]
    each = [jax.tree.map(lambda of_steps, i=i: of_steps[i], stacked) for i in range(len(at_steps))]
    return [gathered(prompts, groups, found, image_tokens) for found in each], pictures


def gathered(
    prompts: Sequence[str], groups: TokenGroups, found: BlockStatistics, image_tokens: int
) -> PromptStatistics:
    """Brings statistics to the host. Raises FloatingPointError if shares are not finite."""
    found = jax.tree.map(np.asarray, found)
    sizes = groups.sizes(image_tokens)
    if not np.isfinite(found.shares[:, :, :, 0]).all():
        raise FloatingPointError("shares of attention are not finite: damaged weights or inputs")
    return PromptStatistics(tuple(prompts), groups.all_names, sizes, found)
