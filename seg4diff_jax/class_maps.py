"""From noised images and prompts to the class maps of one block, fused and refined: one jitted call.

NoisedImages or Views -> prompt_maps or concept_maps -> fused over views -> balanced -> refined -> class scores
"""

from __future__ import annotations

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from seg4diff_jax.models.attention import AttentionRequest, ForwardOptions, JointAttention, joint_attention
from seg4diff_jax.models.concepts import attend_to_image_and_group, image_to_concepts, output_likeness
from seg4diff_jax.models.conditioning import TextConditioning
from seg4diff_jax.models.kernels import Kernel
from seg4diff_jax.models.sd3.model import MMDiT
from seg4diff_jax.models.trunk import concepts_at
from seg4diff_jax.passes import NoisedImages, Views, attention
from seg4diff_jax.segmentation.balance import balanced, minmax, normalized
from seg4diff_jax.segmentation.mask_options import PAPERS_MASKS, MaskOptions, Normalization
from seg4diff_jax.segmentation.open_vocabulary import class_scores, combine_prompts
from seg4diff_jax.segmentation.refinement import refined

Between = tuple[Float[Array, "rows tokens heads head_dim"], Float[Array, "rows tokens heads head_dim"]]
"""Queries and keys of image tokens, whose attention to each other refines maps."""


@partial(jax.jit, static_argnames=("block", "kernel", "head", "masks"))
def read_class_scores(
    transformer: MMDiT,
    images: NoisedImages | Views,
    texts: TextConditioning,
    averaging: Float[Array, "prompts classes text"] | np.ndarray,
    beside: TextConditioning | None = None,
    *,
    block: int,
    kernel: Kernel | None = None,
    head: int | None = None,
    masks: MaskOptions = PAPERS_MASKS,
) -> Float[Array, "images classes grid_rows grid_columns"]:
    """Returns the mean attention of each image token to each class's words in one block (Seg4Diff, section 3).

    Args:
      images: one noised view of each image, or as many as `masks` fuses.
      texts: the prompts. Where `masks` reads concepts, as many for each image, in order of the images.
      averaging: weights of each class's tokens in each prompt (`ClassPrompts.averaging`).
      beside: where `masks` reads concepts, the text that each image reads.
      block: the number of the block that is read.
      head: one head of it; None: the mean of all.
      masks: how maps are fused and refined.
    """
    views = images if isinstance(images, Views) else Views((images,))
    first, patch = views.each[0], transformer.config.patch_size
    how = {"block": block, "head": head, "masks": masks, "kernel": kernel}
    maps = fused_class_maps(transformer, views, texts, jnp.asarray(averaging), beside, **how)
    owner = first.image_of_prompt
    if owner is None or masks.reading != "prompt":
        owner = jnp.arange(len(first))
    scores = combine_prompts(maps, owner, len(first))
    return scores.reshape(*scores.shape[:2], *first.grid(patch))


def fused_class_maps(
    transformer: MMDiT,
    views: Views,
    texts: TextConditioning,
    averaging: Float[Array, "prompts classes text"],
    beside: TextConditioning | None = None,
    *,
    block: int,
    head: int | None,
    masks: MaskOptions,
    kernel: Kernel | None = None,
) -> Float[Array, "rows classes tokens"]:
    """Returns class maps of one block, mean over views, balanced and refined as the options say.

    A row is a prompt, or an image where prompts are concepts. Arguments are as for `read_class_scores`.
    """
    refine = (block if masks.refine_block is None else masks.refine_block) if masks.rounds else None
    count = len(views.each)
    seen = views.as_one() if count > 1 else views.each[0]
    how = {"block": block, "head": head, "refine": refine, "kernel": kernel}
    # The views of a row follow one another, so that all of them lie on one device.
    every = lambda leaf: jnp.repeat(leaf, count, axis=0)
    if masks.reading == "prompt":
        texts, averaging = jax.tree.map(every, (texts, averaging))
        each, between = prompt_maps(transformer, seen, texts, averaging, normalize=masks.normalize, **how)
    else:
        assert beside is not None, "concepts are read beside a text"
        groups = len(averaging) // (len(seen) // count)
        in_views = lambda leaf: every(leaf.reshape(-1, groups, *leaf.shape[1:])).reshape(-1, *leaf.shape[1:])
        texts, averaging = jax.tree.map(in_views, (texts, averaging))
        how |= {"normalize": masks.normalize, "outputs": masks.reading == "concept outputs"}
        each, between = concept_maps(transformer, seen, jax.tree.map(every, beside), texts, averaging, **how)
    rows, grid = len(each) // count, seen.grid(transformer.config.patch_size)
    flip = lambda maps: views.mirrored_back(maps.reshape(rows, count, -1, *grid)).reshape(rows * count, -1, *grid)
    fuse = lambda maps: flip(maps).reshape(rows, count, *maps.shape[1:]).mean(axis=1)
    maps = balanced(fuse(each), masks.balance)
    for _ in range(masks.rounds):
        assert between is not None
        own = flip(every(maps)).reshape(rows * count, -1, maps.shape[-1])
        maps = fuse(refined(own, *between, sharpness=masks.sharpness, heads=masks.refine_heads, kernel=kernel))
    return maps


def prompt_maps(
    transformer: MMDiT,
    images: NoisedImages,
    texts: TextConditioning,
    averaging: Float[Array, "prompts classes text"],
    *,
    block: int,
    head: int | None,
    normalize: Normalization,
    refine: int | None,
    kernel: Kernel | None,
) -> tuple[Float[Array, "prompts classes tokens"], Between | None]:
    """Returns class maps of images that read the prompts, a row for each prompt; and what refines them.

    Args:
      refine: the block that refines, or None.
    """
    request = AttentionRequest(scores=False, mean_heads=head is None, qkv=refine is not None)
    blocks = tuple({block: None, block if refine is None else refine: None})
    records = attention(transformer, images, texts, blocks=blocks, options=ForwardOptions(request, kernel))
    probs: Any = records[block].probs if head is None else records[block].probs[:, head]
    maps = normalized(class_scores(probs, averaging), probs, averaging, normalize)
    return maps, None if refine is None else image_queries_and_keys(records[refine], maps.shape[-1])


def concept_maps(
    transformer: MMDiT,
    images: NoisedImages,
    beside: TextConditioning,
    texts: TextConditioning,
    averaging: Float[Array, "groups classes text"],
    *,
    outputs: bool,
    block: int,
    head: int | None,
    normalize: Normalization,
    refine: int | None,
    kernel: Kernel | None,
) -> tuple[Float[Array, "images classes tokens"], Between | None]:
    """Returns class maps of images beside whose text the prompts are read as concepts; and what refines them.

    Args:
      beside: the text that each image reads.
      texts: as many prompts for each image, in order of the images.
      averaging: of the prompts.
      outputs: read how alike attention's outputs are, not the attention to concepts.
      refine: the block that refines, not after `block`, or None.
    """
    (latents, timesteps), clip_tokens = images.inputs(), averaging.shape[-1]
    earlier = () if refine is None or refine == block else (refine,)
    options = ForwardOptions(AttentionRequest((), qkv=True), kernel)
    seen = latents, timesteps, beside, texts
    image, text, own, records = concepts_at(transformer, *seen, block=block, options=options, capture=earlier)
    if outputs:
        image_outputs, *_ = joint_attention(image, text, ForwardOptions(None, kernel))
        own_outputs = attend_to_image_and_group(own, image, kernel)[:, :clip_tokens]
        maps = output_likeness(image_outputs, own_outputs, averaging, head)
        maps = minmax(maps) if normalize == "minmax" else maps
    else:
        probs = image_to_concepts(own, image, (0, clip_tokens), kernel)
        probs = probs.mean(axis=1) if head is None else probs[:, head]
        maps = normalized(class_scores(probs, averaging), probs, averaging, normalize)
    maps = maps.reshape(len(latents), -1, *maps.shape[1:]).sum(axis=1)
    if refine is None or refine == block:
        return maps, None if refine is None else (image.q, image.k)
    return maps, image_queries_and_keys(records[refine], maps.shape[-1])


def image_queries_and_keys(record: JointAttention, tokens: int) -> Between:
    """Returns those of the image tokens, which come first."""
    assert record.q is not None
    assert record.k is not None
    return record.q[:, :tokens], record.k[:, :tokens]
