"""The compiled path from images and prompts to confusion matrices (Seg4Diff, section 3).

Of every batch images and prompts are encoded once; each noise level and seed is one pass of the transformer, in which
all blocks asked for are recorded. Scores are upsampled, compared and counted on the device:

    encode_images -> attention_maps -> add_scores -> count
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import PartitionSpec
from jaxtyping import Array, Float, Int, UInt8

from seg4diff_jax.evaluation.batches import EvaluationBatch
from seg4diff_jax.flow import add_noise, image_noise
from seg4diff_jax.models.attention import AttentionRequest
from seg4diff_jax.models.clip import CLIPText
from seg4diff_jax.models.mmdit import MMDiT, attentions_at
from seg4diff_jax.models.t5 import T5Encoder
from seg4diff_jax.models.vae import VAE
from seg4diff_jax.parallel import BATCH
from seg4diff_jax.pipeline import Pipeline
from seg4diff_jax.segmentation.metrics import IGNORED, confusion_matrix
from seg4diff_jax.segmentation.open_vocabulary import class_scores, combine_prompts, label_map
from seg4diff_jax.text import TextConditioning, TokenIds, encode_prompts, tokenize

REMEMBERED = 256
"""Prompts whose encoding is kept, about 2.5 MB each at SD3's sizes in fp32."""
MOST_COUNTED = 2**31 - 1
"""Pixels that a matrix of 32-bit numbers can count."""
PERMUTED, RANDOM = "permuted", "random"


class Pass(NamedTuple):
    """One look at every image.

    Attributes:
      step: the noise level, counted from the clean end of 28.
      seed: of the noise.
      prompts: what is asked for: `present` or `all` classes.
    """

    step: int
    seed: int
    prompts: str = "present"


class Counted(NamedTuple):
    """Pixels counted over some images, int64; the places of `passes` and `guesses` are those of a `ZeroShot`.

    Attributes:
      permuted: of the maps of the first noise level with their positions permuted, image by image.
      random: of random scores in place of the first block's.
      right: how many pixels of each image are right.
    """

    confusion: Int[np.ndarray, "passes blocks classes classes"]
    permuted: Int[np.ndarray, "guesses blocks classes classes"]
    random: Int[np.ndarray, "guesses 1 classes classes"]
    right: Int[np.ndarray, "passes blocks images"]


class Tally:
    """Confusion matrices of several blocks: counted on the device, summed up on the host in 64 bits when need be."""

    def __init__(self, blocks: int, classes: int):
        self._shape = (blocks, classes, classes)
        self._device: Array | None = None
        self._host = np.zeros(self._shape, np.int64)
        self._pixels = 0

    def count(
        self, scores: Float[Array, "blocks images classes tokens"], grid: tuple[int, int], batch: EvaluationBatch
    ) -> Int[Array, "blocks images"]:
        """Add a batch; returns how many pixels of each image are right."""
        if self._pixels + batch.truth.size > MOST_COUNTED:
            self.total()
        self._pixels += batch.truth.size
        former = jnp.zeros(self._shape, jnp.int32) if self._device is None else self._device
        self._device, right = count(former, scores, batch.truth, batch.sizes, batch.class_of_row, grid=grid)
        return right

    def total(self) -> Int[np.ndarray, "blocks classes classes"]:
        if self._device is not None:
            self._host += np.asarray(self._device)
            self._device, self._pixels = None, 0
        return self._host


class ZeroShot:
    """Confusion matrices of a set of images, for several blocks, noise levels and seeds of one model.

    Images are split over the devices of the model's mesh, if it has one.

    Attributes:
      passes: every noise level with every seed, for each kind of prompts; each is a pass of its own.
      guesses: kind of prompts and seed of the guessers that are counted beside.
      tallies: for every pass, and for `(PERMUTED, *guess)` and `(RANDOM, *guess)`, see `Counted`.

    Args:
      blocks: whose attention is read; all come out of one pass.
      prompts: kinds of prompts; `add` takes one batch for each.
    """

    def __init__(
        self,
        pipe: Pipeline,
        classes: int,
        *,
        blocks: Sequence[int],
        steps: Sequence[int],
        seeds: Sequence[int],
        prompts: Sequence[str] = ("present",),
    ):
        self.pipe, self.blocks, self.classes, self.prompts = pipe, tuple(blocks), classes, tuple(prompts)
        self.passes = tuple(Pass(step, seed, kind) for kind in prompts for seed in seeds for step in steps)
        self.guesses = tuple((kind, seed) for kind in prompts for seed in seeds)
        self._sigmas = {step: jnp.float32(pipe.schedule.sigma_at(step)) for step in steps}
        self._first_step = steps[0]
        self._pending: list[tuple[Pass, int, Array]] = []
        self._texts: dict[str, TextConditioning] = {}
        self._reset()

    def _reset(self) -> None:
        names = [*self.passes, *((PERMUTED, *guess) for guess in self.guesses)]
        self.tallies: dict[tuple, Tally] = {name: Tally(len(self.blocks), self.classes) for name in names}
        self.tallies |= {(RANDOM, *guess): Tally(1, self.classes) for guess in self.guesses}
        self._right: dict[Pass, list[np.ndarray]] = {one: [] for one in self.passes}

    def add(self, *batches: EvaluationBatch) -> None:
        """Count the same images, asked for the classes of each kind of prompts.

        Returns once the images before them have been counted: the host prepares some while others run.

        Raises FloatingPointError when scores are not finite: the weights are damaged.
        """
        before, self._pending = self._pending, []
        with self.pipe.settings():
            latents = encode_images(self.pipe.vae, self.pipe.spread(batches[0].pixels))
            for kind, batch in zip(self.prompts, batches, strict=True):
                conditioning = [self._encoded(rows.texts) for rows in batch.prompts]
                for one in self.passes:
                    if one.prompts == kind:
                        self._count(batch, latents, conditioning, one)
        self._keep(before)

    def _count(
        self, batch: EvaluationBatch, latents: Float[Array, "i r c ch"], conditioning: list[TextConditioning], one: Pass
    ) -> None:
        scores, grid = self._scores(batch, latents, conditioning, one)
        right = self.tallies[one].count(scores, grid, batch)
        self._pending.append((one, len(batch.examples), right))
        if one.step == self._first_step:
            permuted, random = without_images(scores, batch.indices, one.seed)
            self.tallies[PERMUTED, one.prompts, one.seed].count(permuted, grid, batch)
            self.tallies[RANDOM, one.prompts, one.seed].count(random, grid, batch)

    def take(self) -> Counted:
        """All that has been counted since the last call."""
        self._keep(self._pending)
        self._pending = []
        total = lambda names: np.stack([self.tallies[name].total() for name in names])
        none = np.zeros((len(self.blocks), 0), np.int64)
        counted = Counted(
            total(self.passes),
            total([(PERMUTED, *guess) for guess in self.guesses]),
            total([(RANDOM, *guess) for guess in self.guesses]),
            np.stack([np.concatenate([none, *pieces], axis=1) for pieces in self._right.values()]),
        )
        self._reset()
        return counted

    def running(self) -> Int[np.ndarray, "blocks classes classes"]:
        """What the first pass has counted since `take`; waits for the device."""
        return self.tallies[self.passes[0]].total()

    def scores(self, batch: EvaluationBatch, one: Pass) -> Float[np.ndarray, "blocks images classes rows columns"]:
        """Class scores of a batch in one pass, on the grid of image tokens; rows as in `batch.class_of_row`."""
        with self.pipe.settings():
            latents = encode_images(self.pipe.vae, self.pipe.spread(batch.pixels))
            conditioning = [self._encoded(rows.texts) for rows in batch.prompts]
            scores, grid = self._scores(batch, latents, conditioning, one)
        return np.asarray(scores).reshape(*scores.shape[:3], *grid)

    def _keep(self, counted: list[tuple[Pass, int, Array]]) -> None:
        for one, images, right in counted:
            numbers = np.asarray(right)[:, :images]
            if (numbers < 0).any():
                raise FloatingPointError(f"scores at step {one.step} are not finite: the weights are damaged")
            self._right[one].append(numbers.astype(np.int64))

    def _scores(
        self,
        batch: EvaluationBatch,
        latents: Float[Array, "images rows columns channels"],
        conditioning: list[TextConditioning],
        one: Pass,
    ) -> tuple[Float[Array, "blocks images classes tokens"], tuple[int, int]]:
        images, height, width, channels = latents.shape
        noise = self.pipe.spread(image_noise(one.seed, batch.indices, (height, width, channels)))
        patch = self.pipe.transformer.config.patch_size
        grid = (height // patch, width // patch)
        shape = (len(self.blocks), images, batch.class_of_row.shape[1], grid[0] * grid[1])
        scores = jnp.zeros(shape, jnp.float32)
        for rows, texts in zip(batch.prompts, conditioning, strict=True):
            image_of_row, averaging, texts = self.pipe.spread((rows.image_of_row, rows.averaging, texts))
            maps = attention_maps(
                self.pipe.transformer,
                (latents, noise, image_of_row),
                texts,
                self._sigmas[one.step],
                blocks=self.blocks,
                columns=averaging.shape[-1],
                equal_tail=self.pipe.zero_tokens,
            )
            scores = add_scores(scores, maps, averaging, image_of_row)
        return scores, grid

    def _encoded(self, texts: Sequence[str]) -> TextConditioning:
        """States of the prompts, of which those not yet known are encoded, as many at a time as there are rows."""
        new = [text for text in dict.fromkeys(texts) if text not in self._texts]
        if new:
            filled = [*new, *new[-1:] * (len(texts) - len(new))]
            pipe = self.pipe
            joint_dim = pipe.transformer.config.joint_attention_dim
            ids = tokenize(pipe.tokenizers, filled)
            encoded = encode_texts(pipe.clip_l, pipe.clip_g, pipe.t5, ids, joint_dim=joint_dim)
            self._texts |= zip(new, encoded, strict=False)
        chosen = [self._texts[text] for text in texts]
        for text in list(self._texts)[: -max(REMEMBERED, len(texts))]:
            del self._texts[text]
        return stack_texts(chosen)


# ---- compiled programs ----------------------------------------------------------------------------------------------


@jax.jit
def encode_images(vae: VAE, pixels: Float[Array, "images height width 3"]) -> Float[Array, "images rows columns ch"]:
    """Clean latents, fp32."""
    return vae.encode(pixels).astype(jnp.float32)


@partial(jax.jit, static_argnames=("joint_dim",))
def encode_texts(
    clip_l: CLIPText, clip_g: CLIPText, t5: T5Encoder | None, ids: TokenIds, joint_dim: int
) -> list[TextConditioning]:
    """Each prompt's states by themselves, to be kept."""
    encoded = encode_prompts(clip_l, clip_g, t5, ids, joint_dim=joint_dim)
    return [jax.tree.map(lambda leaf, i=i: leaf[i], encoded) for i in range(len(encoded.pooled))]


@jax.jit
def stack_texts(texts: list[TextConditioning]) -> TextConditioning:
    return jax.tree.map(lambda *leaves: jnp.stack(leaves), *texts)


@partial(jax.jit, static_argnames=("blocks", "columns", "equal_tail"))
def attention_maps(
    transformer: MMDiT,
    images: tuple[Float[Array, "images r c ch"], Float[Array, "images r c ch"], Int[Array, " rows"]],
    texts: TextConditioning,
    sigma: Float[Array, ""],
    *,
    blocks: tuple[int, ...],
    columns: int,
    equal_tail: int,
) -> Float[Array, "blocks rows tokens columns"]:
    """Attention of every image token to the first `columns` text tokens, averaged over heads, for rows of prompts.

    Args:
      images: clean latents, noise, and which image each row is about.
      blocks: all come out of one pass, which ends in the last of them.
    """
    latents, noise, image_of_row = images
    noisy = add_noise(latents, noise, sigma)[image_of_row]
    inputs = noisy, jnp.full(len(noisy), 1000 * sigma), *texts
    request = AttentionRequest(scores=False, mean_heads=True, text_tokens=(0, columns))
    records = attentions_at(transformer, *inputs, blocks=blocks, request=request, equal_tail=equal_tail)
    return jnp.stack([records[block].probs for block in blocks])  # pyright: ignore


@partial(jax.jit, donate_argnames=("scores",))
def add_scores(
    scores: Float[Array, "blocks images classes tokens"],
    maps: Float[Array, "blocks rows tokens columns"],
    averaging: Float[Array, "rows classes columns"],
    image_of_row: Int[Array, " rows"],
) -> Float[Array, "blocks images classes tokens"]:
    """Class scores of some prompts, added to those of the others: each class is named by one."""
    images = scores.shape[1]
    some = jax.lax.map(lambda block: combine_prompts(class_scores(block, averaging), image_of_row, images), maps)
    return _split(scores + some, 1)


def _split(array: Array, axis: int) -> Array:
    """Split the axis of images over the mesh's data axes, if there is a mesh."""
    no_mesh = jax.sharding.get_abstract_mesh().empty
    return array if no_mesh else jax.lax.with_sharding_constraint(array, PartitionSpec(*[None] * axis, *BATCH))


@partial(jax.jit, donate_argnames=("confusion",), static_argnames=("grid",))
def count(
    confusion: Int[Array, "blocks classes classes"],
    scores: Float[Array, "blocks images rows tokens"],
    truth: UInt8[Array, "images height width"],
    sizes: Int[Array, "images 2"],
    class_of_row: Int[Array, "images rows"],
    *,
    grid: tuple[int, int],
) -> tuple[Int[Array, "blocks classes classes"], Int[Array, "blocks images"]]:
    """Upsample scores to each image's own size on the canvas, take the best class of each pixel and count.

    Also how many pixels of each image are right: -1 where a score is not finite.
    """
    canvas = (truth.shape[1], truth.shape[2])
    truth, sizes, class_of_row = (_split(array, 0) for array in (truth, sizes, class_of_row))

    def predicted(scores: Array, size: Array, classes: Array) -> Array:
        rows = scores.reshape(-1, *grid)
        return classes[label_map(rows, size, canvas=canvas, present=classes != IGNORED)]

    def of_block(before_and_scores: tuple[Array, Array]) -> tuple[Array, Array]:
        before, scores = before_and_scores
        labels = _split(jax.vmap(predicted)(_split(scores, 0), sizes, class_of_row), 0)
        right = jnp.sum((labels == truth) & (truth != IGNORED), axis=(1, 2))
        finite = jnp.isfinite(scores).all(axis=(1, 2))
        return before + confusion_matrix(truth, labels, before.shape[0], IGNORED), jnp.where(finite, right, -1)

    return jax.lax.map(of_block, (confusion, scores))


@jax.jit
def without_images(
    scores: Float[Array, "blocks images classes tokens"], indices: Int[Array, " images"], seed: Int[Array, ""]
) -> tuple[Float[Array, "blocks images classes tokens"], Float[Array, "1 images classes tokens"]]:
    """Scores that cannot know where anything is: each image's own with the tokens in random order, and random ones."""

    def of_image(index: Array) -> tuple[Array, Array]:
        # Folded twice: these numbers have nothing to do with those that the image's noise is made of.
        order, values = jax.random.split(jax.random.fold_in(jax.random.fold_in(jax.random.key(seed), index), 1))
        tokens = scores.shape[-1]
        return jax.random.permutation(order, tokens), jax.random.uniform(values, (1, *scores.shape[2:]))

    orders, random = jax.vmap(of_image, out_axes=(0, 1))(indices)
    return jnp.take_along_axis(scores, orders[None, :, None], axis=-1), random
