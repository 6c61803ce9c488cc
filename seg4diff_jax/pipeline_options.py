"""The keyword arguments of `Pipeline`'s methods: types for editors and type checkers, and checks of blocks."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import Any, Literal, Required, TypedDict

import numpy as np
from jaxtyping import Float, UInt8

from seg4diff_jax.checked import Checked
from seg4diff_jax.flow import FlowSchedule, Sampler, check_guidance, is_whole, steps_from_image
from seg4diff_jax.images import ImageInput, Resize, listed
from seg4diff_jax.models.attention import AttentionRequest
from seg4diff_jax.models.kernels import Kernel
from seg4diff_jax.models.perturbation import Perturbation
from seg4diff_jax.models.sd3.model import MMDiT
from seg4diff_jax.segmentation.class_prior import ClassPrior
from seg4diff_jax.segmentation.grouping import Grouping
from seg4diff_jax.segmentation.mask_options import PAPERS_MASKS, MaskOptions
from seg4diff_jax.segmentation.open_vocabulary import Segmentation
from seg4diff_jax.segmentation.unsupervised import MinMax

Picture = UInt8[np.ndarray, "height width 3"]
STRENGTH = 0.6
"""Of image to image, as in diffusers."""
PictureWithMasks = tuple[Picture, Segmentation]


class SeenOptions(TypedDict, total=False):
    """Keyword arguments of `Pipeline.segment` and `Pipeline.segment_unsupervised`: how images are seen."""

    block: int | None
    step: int | None
    seed: int | Sequence[int]
    noise: Any
    size: tuple[int, int] | None
    resize: Resize
    kernel: Kernel | None


class SegmentOptions(SeenOptions, total=False):
    """Keyword arguments of `Pipeline.segment`, whose docstring explains them."""

    masks: MaskOptions | None
    prior: ClassPrior | None


class UnsupervisedOptions(SeenOptions, total=False):
    """Keyword arguments of `Pipeline.segment_unsupervised`, whose docstring explains them."""

    grouping: Grouping
    threshold: float | None
    minmax: MinMax


class AttentionOptions(TypedDict, total=False):
    """Keyword arguments of `Pipeline.attention`, whose docstring explains them."""

    blocks: int | Collection[int] | None
    step: int | None
    seed: int
    noise: Any
    size: tuple[int, int] | None
    resize: Resize
    request: AttentionRequest | None
    kernel: Kernel | None


@dataclass(frozen=True)
class RunSettings(Checked):
    """Options of a generating run, which `Pipeline.generate` takes as keyword arguments.

    Attributes:
      negative_prompt: what guidance leads away from.
      steps: Euler steps from noise to picture.
      guidance: scale of classifier-free guidance. At 1 or less there is none, and a step costs half as much.
      seed, noise: as for `Pipeline.segment`.
      size: height and width of the pictures. Default: the trained square; with an image its aspect, as for `segment`.
      sampler: "euler", SD3's own, also where the checkpoint was saved with another, which otherwise is an error.
      image: what the run starts from instead of noise (image to image): one for all pictures, or one for each.
      strength: how far from the image the run may go: it takes the last strength x `steps` steps, and 1 is as without
        the image. Default: 0.6, as in diffusers.
      perturb: blocks to blur or to skip, and in which steps.
      perturbed_guidance: scale by which the run is guided away from the perturbed prediction, which takes a further
        forward pass in these steps. Default: the run itself is perturbed.
    """

    negative_prompt: str = ""
    steps: int = 28
    guidance: float = 7.0
    seed: int = 0
    noise: Any = None
    size: tuple[int, int] | None = None
    sampler: Sampler | None = None
    image: ImageInput | Sequence[ImageInput] | None = None
    strength: float | None = None
    perturb: Perturbation | None = None
    perturbed_guidance: float | None = None

    def problems(self) -> list[str]:
        """Returns what is wrong with the options, one sentence for each problem."""
        found = []
        try:
            check_guidance(self.guidance)
        except ValueError as error:
            found.append(str(error))
        if self.image is None and self.strength is not None:
            found.append("strength says how far to go from an image: name one with image=")
        if self.perturb is not None and not isinstance(self.perturb, Perturbation):
            found.append(f"perturb is {self.perturb!r}; expected a Perturbation, which says of which blocks")
        if (away := self.perturbed_guidance) is not None:
            if isinstance(away, bool) or not isinstance(away, int | float | np.number) or not 0 < away < np.inf:
                found.append(f"perturbed_guidance is {away!r}; expected a scale above 0, or None to perturb the run")
            if self.perturb is None:
                found.append("perturbed_guidance leads away from a perturbed prediction: name one with perturb=")
        return found

    def sigmas(self, schedule: FlowSchedule) -> Float[np.ndarray, " steps"]:
        """Returns the noise levels of the steps that are taken. Raises ValueError for steps or a strength."""
        sigmas = schedule.sigmas(self.steps)
        if self.image is None:
            return sigmas
        return sigmas[self.steps - steps_from_image(self.steps, STRENGTH if self.strength is None else self.strength) :]

    def images(self, pictures: int) -> list[ImageInput]:
        """Returns the images: none, one for all pictures, or one for each. Raises ValueError for other counts."""
        images, single = ([], True) if self.image is None else listed(self.image)
        if not single and len(images) != pictures:
            raise ValueError(f"{len(images)} images and {pictures} pictures; expected one for all, or one for each")
        return images


class RunOptions(TypedDict, total=False):
    """Keyword arguments of `Pipeline.generating_run` and `Pipeline.generate`, which `RunSettings` explains."""

    negative_prompt: str
    steps: int
    guidance: float
    seed: int
    noise: Any
    size: tuple[int, int] | None
    sampler: Sampler | None
    image: ImageInput | Sequence[ImageInput] | None
    strength: float | None
    perturb: Perturbation | None
    perturbed_guidance: float | None


class GenerateOptions(RunOptions, total=False):
    """Keyword arguments of `Pipeline.generate` for one picture without masks."""

    kernel: Kernel | None
    images_per_prompt: Literal[1]
    segment: None


class ManyOptions(RunOptions, total=False):
    """Those of several pictures without masks."""

    kernel: Kernel | None
    images_per_prompt: int
    segment: None


class MasksOptions(RunOptions, total=False):
    """Those of one picture with masks."""

    kernel: Kernel | None
    images_per_prompt: Literal[1]
    segment: Required[Sequence[str]]
    block: int | None
    at_step: int | None


class ManyMasksOptions(RunOptions, total=False):
    """Those of several pictures with masks."""

    kernel: Kernel | None
    images_per_prompt: int
    segment: Required[Sequence[str] | Sequence[Sequence[str]]]
    block: int | None
    at_step: int | None


def checked_masks(
    masks: MaskOptions | None,
    block: int,
    transformer: MMDiT,
    noise: Any = None,
    prior: ClassPrior | None = None,
) -> MaskOptions:
    """Returns the options of masks, by default the paper's.

    Raises ValueError for what is none, for blocks or heads that the transformer lacks, for given noise that several
    views would have to share, and for a class prior that does not fit.
    """
    if masks is None:
        masks = PAPERS_MASKS
    if not isinstance(masks, MaskOptions):
        raise ValueError(f"masks is {masks!r:.80}; expected a MaskOptions, which says how masks are made")
    masks.check_prior(prior, block)
    masks.check_fits(block, transformer.depth, transformer.config.num_attention_heads)
    if noise is not None and masks.views > 1:
        raise ValueError(
            f"noise is given, and masks has {masks.views} views, each of other noise: leave one of them out"
        )
    return masks


def checked_block(block: int | None, expert: int | None, depth: int) -> int:
    """Returns the block to read: the one that is named, or else the checkpoint's expert block.

    Raises ValueError if neither is known, or the transformer, of which `depth` blocks are loaded, has no such block.
    """
    chosen = expert if block is None else block
    if chosen is None:
        raise ValueError("this checkpoint does not say which block segments best: name one with block=")
    if not is_whole(chosen, 0, depth - 1):
        whose = ", the checkpoint's own," if block is None else ""
        raise ValueError(
            f"block{whose} is {chosen!r}; the loaded transformer has blocks 0..{depth - 1}"
            + (f": load with blocks={chosen + 1} or more, or name one with block=" if block is None else "")
        )
    return int(chosen)


def checked_blocks(blocks: int | Collection[int] | None, depth: int) -> tuple[int, ...]:
    """Returns the numbers of the blocks to read, each once, in order. Default: all that are loaded.

    Raises as `checked_block` does.
    """
    if blocks is None:
        return tuple(range(depth))
    several = (blocks,) if isinstance(blocks, int | np.integer) else blocks
    return tuple(sorted({checked_block(block, None, depth) for block in several}))
