"""One loaded SD3: from image files and class names to masks, and from prompts to pictures."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from functools import partial
from typing import Any, Unpack, overload

import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from jaxtyping import Array, Float

from seg4diff_jax import passes
from seg4diff_jax.batching import ModelView, SizeGroup, finite_maps, listed_seeds, one_for_each
from seg4diff_jax.class_grids import class_grids
from seg4diff_jax.class_names import list_for_each, one_class, warn_of_single
from seg4diff_jax.flow import FlowSchedule, add_noise
from seg4diff_jax.generated_masks import mask_step, pictures_with_masks, prompt_words, refuse_unread
from seg4diff_jax.images import ImageInput, Resize, listed, read_image
from seg4diff_jax.models.attention import AttentionRequest, ForwardOptions
from seg4diff_jax.models.conditioning import TextConditioning
from seg4diff_jax.models.encoders import Encoders
from seg4diff_jax.models.kernels import Kernel
from seg4diff_jax.models.sd3.model import MMDiT
from seg4diff_jax.models.vae import VAE
from seg4diff_jax.numerics import computing, settled
from seg4diff_jax.parallel import spread
from seg4diff_jax.pipeline_options import (
    AttentionOptions,
    GenerateOptions,
    ManyMasksOptions,
    ManyOptions,
    MasksOptions,
    Picture,
    PictureWithMasks,
    RunOptions,
    RunSettings,
    SegmentOptions,
    UnsupervisedOptions,
    checked_block,
    checked_blocks,
    checked_masks,
)
from seg4diff_jax.prompt_attention import PromptAttention, prompt_attention
from seg4diff_jax.prompt_cache import PromptCache
from seg4diff_jax.sampling import GeneratingRun, Looking, check_whole, sample_latents
from seg4diff_jax.segmentation.class_prior import ClassPrior
from seg4diff_jax.segmentation.grouping import Grouping, check_threshold
from seg4diff_jax.segmentation.mask_options import PAPERS_MASKS, MaskOptions
from seg4diff_jax.segmentation.open_vocabulary import Segmentation, upsampled_labels
from seg4diff_jax.segmentation.unsupervised import MinMax, UnsupervisedSegmentation, unsupervised_segmentation
from seg4diff_jax.text import Tokenizers, class_prompts, tokenize
from seg4diff_jax.unnamed_segments import unnamed_segments


@dataclass
class Pipeline:
    """Stable Diffusion 3 in memory. `seg4diff_jax.load` makes one; `segment` is what it is for.

    Attributes:
      expert_block: the block whose attention segments best, if known.
      expert_step: the noise level at which it does, counted from the clean end of 28.
      trained_size: side in pixels of the squares that the transformer was trained on.
      mesh: the devices that parameters and batches are spread over, or None for one device.
    """

    transformer: MMDiT = field(repr=False)
    encoders: Encoders = field(repr=False)
    tokenizers: Tokenizers = field(repr=False)
    schedule: FlowSchedule
    expert_block: int | None
    trained_size: int
    expert_step: int = 8
    mesh: Mesh | None = None
    _conditioning: PromptCache = field(default_factory=PromptCache, repr=False)

    # ---- masks ------------------------------------------------------------------------------------------------------

    @overload
    def segment(self, image: ImageInput, classes: Sequence[str], **options: Unpack[SegmentOptions]) -> Segmentation: ...
    @overload
    def segment(
        self,
        image: Sequence[ImageInput],
        classes: Sequence[str] | Sequence[Sequence[str]],
        **options: Unpack[SegmentOptions],
    ) -> list[Segmentation]: ...
    @settled()
    def segment(
        self,
        image: ImageInput | Sequence[ImageInput],
        classes: Sequence[str] | Sequence[Sequence[str]],
        *,
        block: int | None = None,
        step: int | None = None,
        seed: int | Sequence[int] = 0,
        noise: Float[np.ndarray, "*batch rows columns channels"] | None = None,
        size: tuple[int, int] | None = None,
        resize: Resize = "aspect",
        kernel: Kernel | None = None,
        masks: MaskOptions | None = None,
        prior: ClassPrior | None = None,
    ) -> Segmentation | list[Segmentation]:
        """Zero-shot open-vocabulary masks from one forward pass on each noised image (Seg4Diff, section 3).

        Args:
          image: a path, a PIL image or a uint8 array [height, width, 3] (see `images.read_image`); or a list of them,
            of any sizes.
          classes: class names, in any number, for all images; or one list of names for each image.
          block: block to read. Default: the checkpoint's expert block.
          step: noise level, counted from the clean end of 28 (the paper's t). Default: the checkpoint's own, or the
            paper's, 8.
          seed: of the noise, 0 to 2^32 - 1; each image of a list has noise of its own, by its position. Of several
            seeds, as in (0, 1, 2), the scores are averaged: a pass for each.
          noise: float32 [latent rows, latent columns, channels] to use instead, or with a leading axis of images.
          size: height and width that the model sees. Default: by `resize`.
          resize: "aspect" keeps the image's, at about the trained number of pixels; "square" squashes it to the
            trained square; "release" does so the released Seg4Diff's way.
          kernel: attention kernel. Default: by backend and dtype.
          masks: how maps are fused and refined (docs/better_masks.md). Default: the paper's masks, which are not.
          prior: what `masks.prior` is a power of (`class_priors.measure_class_prior`).

        Raises:
          ImageError: an image cannot be read.
          ValueError: class names or other options are not usable; the message says why.
          FloatingPointError: the model gave scores that are not finite: damaged weights or inputs.

        Warns (`class_names.OneClassWarning`) of a list of a single class, which takes every pixel.
        """
        images, single = listed(image)
        lists = list_for_each(classes, len(images), "images", single)
        block, _, seeds = self._block(block), self._sigma(step), listed_seeds(seed, noise)
        masks = checked_masks(masks, block, self.transformer, noise, prior)
        prompts = [class_prompts(self.tokenizers, names) for names in lists]
        warn_of_single(map(one_class, lists), stacklevel=4)
        read = partial(class_grids, self.transformer, encode=self.encode_prompts, spread=self.spread)
        read = partial(read, block=block, kernel=kernel, masks=masks, prior=prior)
        results: dict[int, Segmentation] = {}
        for group in self.view.by_size(images, size, resize):
            asked = [prompts[place] for place in group.places]
            with self.settings():
                each = [read(views, asked) for views in self.noised(group, len(images), seeds, noise, step, masks)]
            scores = each[0] if len(each) == 1 else [np.mean(grids, axis=0) for grids in zip(*each, strict=True)]
            for place, own_size, pixels, grid in zip(*group.items, scores, strict=True):
                labels = upsampled_labels(finite_maps(grid, block), own_size, masks=masks, pixels=pixels)
                results[place] = Segmentation(labels, grid, prompts[place].classes, prompts[place].prompts)
        return results[0] if single else [results[place] for place in range(len(images))]

    @overload
    def segment_unsupervised(
        self, image: ImageInput, **options: Unpack[UnsupervisedOptions]
    ) -> UnsupervisedSegmentation: ...
    @overload
    def segment_unsupervised(
        self, image: Sequence[ImageInput], **options: Unpack[UnsupervisedOptions]
    ) -> list[UnsupervisedSegmentation]: ...
    @settled()
    def segment_unsupervised(
        self,
        image: ImageInput | Sequence[ImageInput],
        *,
        grouping: Grouping = "pads",
        threshold: float | None = None,
        minmax: MinMax = "pixel",
        block: int | None = None,
        step: int | None = None,
        seed: int | Sequence[int] = 0,
        noise: Float[np.ndarray, "*batch rows columns channels"] | None = None,
        size: tuple[int, int] | None = None,
        resize: Resize = "aspect",
        kernel: Kernel | None = None,
    ) -> UnsupervisedSegmentation | list[UnsupervisedSegmentation]:
        """Masks without names, under an empty prompt (Seg4Diff, section 3).

        Args:
          grouping: `pads` merges the maps of the prompt's tokens that are alike, as in the paper; `diffseg` merges maps
            of image-to-image attention; `diffcut` cuts the image where features differ (docs/unsupervised.md).
          threshold: maps merge that diverge by less; larger, fewer segments. With `diffcut` parts are cut whose
            normalized cut is lower; larger, more segments. Default: see `segmentation.grouping.check_threshold`.
          minmax: what maps of `pads` are brought to 0..1 over, see `segmentation.unsupervised.MinMax`.
          image and all others: as for `segment`. Of several seeds the attention is averaged before it is merged.

        Raises:
          ImageError, ValueError, FloatingPointError: as `segment` does; ValueError too for the first three options.
        """
        images, single = listed(image)
        threshold, block, _ = check_threshold(threshold, minmax, grouping), self._block(block), self._sigma(step)
        how = {"block": block, "grouping": grouping, "threshold": threshold, "minmax": minmax, "kernel": kernel}
        results: dict[int, UnsupervisedSegmentation] = {}
        seeds = listed_seeds(seed, noise)
        for group in self.view.by_size(images, size, resize):
            noised = self.noised(group, len(images), seeds, noise, step)
            texts = self.spread(self.encode_prompts([""] * len(group.places)))
            with self.settings():
                seen = [views.each[0] for views in noised]
                maps, counts = unnamed_segments(self.transformer, seen, texts, **how)
            grids = finite_maps(maps, block).reshape(*maps.shape[:2], *group.grid)
            for place, own_size, grid, count in zip(group.places, group.own_sizes, grids, counts, strict=True):
                results[place] = unsupervised_segmentation(grid, int(count), own_size)
        return results[0] if single else [results[place] for place in range(len(images))]

    @overload
    def attention(
        self, image: ImageInput, prompt: str, **options: Unpack[AttentionOptions]
    ) -> dict[int, PromptAttention]: ...
    @overload
    def attention(
        self, image: Sequence[ImageInput], prompt: str | Sequence[str], **options: Unpack[AttentionOptions]
    ) -> list[dict[int, PromptAttention]]: ...
    @settled()
    def attention(
        self,
        image: ImageInput | Sequence[ImageInput],
        prompt: str | Sequence[str],
        *,
        blocks: int | Collection[int] | None = None,
        step: int | None = None,
        seed: int = 0,
        noise: Float[np.ndarray, "*batch rows columns channels"] | None = None,
        size: tuple[int, int] | None = None,
        resize: Resize = "aspect",
        request: AttentionRequest | None = None,
        kernel: Kernel | None = None,
    ) -> dict[int, PromptAttention] | list[dict[int, PromptAttention]]:
        """Joint attention of any blocks on a noised image under a prompt; arguments as for `segment`.

        Args:
          prompt: one for all images; or one for each image.
          blocks: one number or several, all read in one pass that ends in the last. Default: all that are loaded.
          request: which maps. Default: image-to-text scores and probabilities of CLIP's tokens, heads kept.

        Returns each block's record, whose arrays keep a leading axis of 1; of a list of images a list of these. A
        word's map is `record.of(word)`.
        """
        images, single = listed(image)
        prompts = [prompt] * len(images) if isinstance(prompt, str) else list(prompt)
        if len(images) != len(prompts):
            raise ValueError(f"{len(images)} images and {len(prompts)} prompts; expected one for all, or one for each")
        request, wanted = request or AttentionRequest(), checked_blocks(blocks, self.transformer.depth)
        results: dict[int, dict[int, PromptAttention]] = {}
        for group in self.view.by_size(images, size, resize):
            noised = self.noised(group, len(images), (seed,), noise, step)[0].each[0]
            asked = {place: prompts[place] for place in group.places}
            texts = self.spread(self.encode_prompts([*asked.values()]))
            with self.settings():
                options = ForwardOptions(request, kernel)
                records = passes.attention(self.transformer, noised, texts, blocks=wanted, options=options)
            results |= prompt_attention(records, asked, texts, self.tokenizers, group.grid, request)
        return results[0] if single else [results[place] for place in range(len(images))]

    # ---- pictures ---------------------------------------------------------------------------------------------------

    @overload
    def generate(self, prompt: str, **options: Unpack[GenerateOptions]) -> Picture: ...
    @overload
    def generate(self, prompt: str | Sequence[str], **options: Unpack[ManyOptions]) -> list[Picture]: ...
    @overload
    def generate(self, prompt: str, **options: Unpack[MasksOptions]) -> PictureWithMasks: ...
    @overload
    def generate(self, prompt: str | Sequence[str], **options: Unpack[ManyMasksOptions]) -> list[PictureWithMasks]: ...
    @settled()
    def generate(
        self,
        prompt: str | Sequence[str],
        *,
        images_per_prompt: int = 1,
        segment: Sequence[str] | Sequence[Sequence[str]] | None = None,
        block: int | None = None,
        at_step: int | None = None,
        kernel: Kernel | None = None,
        **options: Unpack[RunOptions],
    ) -> Picture | list[Picture] | PictureWithMasks | list[PictureWithMasks]:
        """Pictures of prompts, uint8 [height, width, 3]: one for one prompt, otherwise a list, made in one batch.

        With `segment` each comes with its masks, read in the run itself: a pair of a picture and a `Segmentation`.

        Args:
          prompt: one, or a list. With several `images_per_prompt`, those of the first prompt come first.
          segment: words of the prompt, or several that follow one another, for all prompts; or a list for each prompt.
            Of a single one, which takes every pixel, `class_names.OneClassWarning` warns.
          block, kernel: as for `segment`.
          at_step: step to read, counted as noise levels: 1 is the last. Default: the checkpoint's, scaled to `steps`.
          options: of the run: negative_prompt, steps (28), guidance (7.0), seed, noise, size, sampler, image, strength,
            perturb and perturbed_guidance, which `pipeline_options.RunSettings` explains.

        Raises:
          ValueError: an option is not usable, or the last blocks of the transformer are not loaded.
          FloatingPointError: the model gave pixels that are not finite: damaged weights.
        """
        prompts = one_for_each([prompt] if isinstance(prompt, str) else prompt, images_per_prompt)
        if (images := options.get("image")) is not None and not listed(images)[1]:
            options["image"] = one_for_each(listed(images)[0], images_per_prompt)
        run = self.generating_run(prompts or [""], **options)
        if not prompts:
            return []
        with self.settings():
            if segment is None:
                refuse_unread(block, at_step)
                made = passes.finite_pictures(self.vae, sample_latents(self.transformer, run, kernel=kernel))
            else:
                words = prompt_words(self.tokenizers, prompt, segment, images_per_prompt)
                read = mask_step(at_step, self.expert_step, RunSettings(**options).steps, len(run.sigmas))
                looking = Looking((self._block(block),), (len(run.sigmas) - read,))
                made = pictures_with_masks(self.transformer, self.vae, run, words, looking, kernel)
        return made[0] if isinstance(prompt, str) and images_per_prompt == 1 else made

    def generating_run(self, prompts: Sequence[str], **options: Unpack[RunOptions]) -> GeneratingRun:
        """What pictures of these prompts are sampled from: options checked, prompts and images encoded.

        Raises as `generate` does.
        """
        check_whole(self.transformer)
        asked, count = RunSettings(**options), len(prompts)
        self.schedule.check_sampler(asked.sampler)
        sigmas = jnp.asarray(asked.sigmas(self.schedule), jnp.float32)
        images = asked.images(count)
        wanted = self.view.common_size(images, asked.size) if images else self.view.size((0, 0), asked.size, "square")
        latents = self.view.noise(asked.noise, list(range(count)), count, wanted, asked.seed)
        if images:
            clean = jnp.broadcast_to(self.encode_images(images, wanted), latents.shape)
            latents = add_noise(clean, latents, sigmas[0])
        negative = self.encode_prompts([asked.negative_prompt]) if asked.guidance > 1 else None
        latents, texts = self.spread((latents, self.encode_prompts(prompts)))
        guidance = None if negative is None else (negative, jnp.float32(asked.guidance))
        run, depth = GeneratingRun(latents, texts, sigmas, guidance), self.transformer.depth
        return run if asked.perturb is None else run.with_perturbation(asked.perturb, depth, asked.perturbed_guidance)

    # ---- parts ------------------------------------------------------------------------------------------------------

    def encode_images(
        self, images: Sequence[ImageInput], size: tuple[int, int], resize: Resize = "square"
    ) -> Float[Array, "batch rows columns channels"]:
        """Clean latents of images, fp32, each resampled to `size` (height, width)."""
        wanted = self.view.size((0, 0), size, resize)
        pixels = self.view.pixels([read_image(image) for image in images], wanted, resize)
        with self.settings():
            return passes.encode_images(self.vae, pixels)

    @settled()
    def encode_prompts(self, prompts: str | Sequence[str], *, rows: int | None = None) -> TextConditioning:
        """Context [batch, tokens, features] and pooled vectors. `prompt_cache` says what `rows` are and what is kept.

        Raises ValueError when there is no prompt.
        """
        prompts = [prompts] if isinstance(prompts, str) else prompts
        if not prompts:
            raise ValueError('expected at least one prompt, found none; for no text write [""]')
        joint_dim = self.transformer.config.joint_attention_dim
        encode = lambda new: passes.encode_prompts(self.encoders, tokenize(self.tokenizers, new), joint_dim=joint_dim)
        with self.settings():
            return self._conditioning.conditioning(prompts, encode, rows)

    def noised(
        self,
        group: SizeGroup,
        images: int,
        seeds: Sequence[int],
        noise: Float[np.ndarray, "*batch rows columns channels"] | None,
        step: int | None,
        masks: MaskOptions = PAPERS_MASKS,
    ) -> list[passes.Views]:
        """Images of a list of so many, encoded once, at a noise level: under the noise of each seed, in each view."""
        size, asked = group.pixels.shape[1:3], self.expert_step if step is None else step
        with self.settings():
            latents = passes.encode_images(self.vae, self.spread(group.pixels))
        noised = lambda seed, view: passes.NoisedImages(
            latents,
            self.spread(self.view.noise(noise, group.places, images, size, seed, view)),
            self._sigma(masks.level_of(view, asked)),
        )
        each = lambda seed: tuple(noised(seed, view) for view in range(masks.views))
        return [passes.Views(each(seed), masks.mirrors) for seed in seeds]

    def spread(self, arrays: Any) -> Any:
        """On the mesh's devices, leading axes split where they divide."""
        return spread(arrays, self.mesh)

    def settings(self) -> AbstractContextManager[None]:
        """JAX's options while this model computes: `numerics.computing`."""
        return computing(self.transformer.context_embed.dtype, self.mesh)

    def _sigma(self, step: int | None) -> Float[Array, ""]:
        return jnp.float32(self.schedule.sigma_at(self.expert_step if step is None else step))

    def _block(self, block: int | None) -> int:
        return checked_block(block, self.expert_block, self.transformer.depth)

    @property
    def vae(self) -> VAE:
        assert self.encoders.vae is not None, "a pipeline has its autoencoder"
        return self.encoders.vae

    @property
    def view(self) -> ModelView:
        """How the model sees images."""
        return ModelView.of(self.transformer.config, self.vae.config, self.trained_size)
