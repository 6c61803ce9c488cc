"""The programs that the evaluator runs for a batch of images, with the shapes and places of their arguments.

The programs are the evaluator's own, and so is their order: `evaluation.readouts.Forward` and `evaluation.zero_shot`.
What the host does between them is left out: prompts that were used before are stacked, arrays are sent to the chips.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, Literal

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from seg4diff_jax.checkpoints import Checkpoint, parameter_dtype
from seg4diff_jax.convert.components import abstract_model
from seg4diff_jax.evaluation.batches import class_rows
from seg4diff_jax.evaluation.options import BATCH_TOKENS
from seg4diff_jax.evaluation.readouts import Readout, attention_maps
from seg4diff_jax.evaluation.zero_shot import add_scores, count, without_images
from seg4diff_jax.models.encoders import Encoders, TokenIds
from seg4diff_jax.parallel import BATCH
from seg4diff_jax.passes import NoisedImages, encode_images, encode_prompts
from seg4diff_jax.planning.checkpoints import describe
from seg4diff_jax.planning.placement import placed
from seg4diff_jax.segmentation.mask_options import PAPERS_MASKS

CANVAS = (512, 1024)
"""Height and width that label maps are padded to. Most of ADE's, COCO's and Context's are on such a canvas."""
CLASSES_PRESENT = 16
"""Most classes of an image in a batch whose prompts name the classes present."""
Run = Callable[..., Any]
"""Takes a program's name, how often a batch runs it, the jitted function, and its arguments, which have shapes alone.
Returns the results' shapes."""


@dataclass(frozen=True)
class EvaluatorConfig:
    """What is evaluated: one pass, which is one noise level with one seed, with the guessers that it is compared with.

    Attributes:
      model: a name or directory, see `planning.checkpoints.describe`.
      dtype: of parameters and computation.
      block: whose attention is read. Default: the checkpoint's expert block.
      size: side of the square that the model sees, in pixels. Default: the trained one.
      batch_size: images, and prompts, at a time on one host. Default: as the evaluator chooses it.
      prompts: `present`: an image's prompts are its own, and are encoded with it; `all`: they are those of the whole
        vocabulary, which are encoded once for the set.
      prompts_per_image: how many an image has; each is a pass of the transformer.
      classes: number of classes of the set.
    """

    model: str = "sd3-medium"
    dtype: Literal["float32", "bfloat16"] = "bfloat16"
    block: int | None = None
    size: int | None = None
    batch_size: int | None = None
    prompts: Literal["present", "all"] = "present"
    prompts_per_image: int = 1
    classes: int = 150

    @property
    def class_rows(self) -> int:
        """Number of rows of scores of an image."""
        return class_rows(self.classes if self.prompts == "all" else min(self.classes, CLASSES_PRESENT))


def described(config: EvaluatorConfig) -> Checkpoint:
    """Returns the checkpoint without T5, as the evaluator opens it; neither weights nor tokenizers need exist.

    Raises CheckpointError if the checkpoint's configuration cannot be read.
    """
    source = describe(config.model)
    configs = {name: value for name, value in source.configs.items() if name != source.family.t5}
    return Checkpoint(replace(source, configs=configs), None)


def settled_config(config: EvaluatorConfig, checkpoint: Checkpoint, chips: int) -> EvaluatorConfig:
    """Returns the options with the checkpoint's defaults in place, for a host of so many chips.

    Raises ValueError when an option does not fit the checkpoint or the chips.
    """
    parameter_dtype(config.dtype)
    most = 255  # the void label
    for name, value, highest in (
        ("prompts-per-image", config.prompts_per_image, config.classes),
        ("classes", config.classes, most),
        ("batch-size", 1 if config.batch_size is None else config.batch_size, None),
    ):
        if value < 1 or (highest is not None and value > highest):
            upper = "" if highest is None else f" to {highest}"
            raise ValueError(f"--{name} is {value}; expected {'at least 1' if highest is None else '1' + upper}")
    size = checkpoint.size(None if config.size is None else (config.size, config.size))[0]
    tokens = (size // checkpoint.view.multiple) ** 2
    batch = config.batch_size or chips * max(1, BATCH_TOKENS // tokens)
    if batch % chips:
        raise ValueError(f"--batch-size is {batch}; expected a multiple of the {chips} chips of a host")
    return replace(config, block=checkpoint.block(config.block), size=size, batch_size=batch)


@dataclass(frozen=True)
class EvaluatorModels:
    """The models that the evaluator loads, as shapes: no block after the one that is read, and no T5."""

    transformer: Any
    encoders: Encoders

    @classmethod
    def of(cls, config: EvaluatorConfig, checkpoint: Checkpoint, mesh: Mesh) -> EvaluatorModels:
        """Takes options as `settled_config` returns them."""
        dtype, configs = jnp.dtype(config.dtype), checkpoint.source.configs
        part: Any = lambda name, **how: placed(abstract_model(name, configs[name], dtype, **how), mesh)
        assert config.block is not None
        transformer = part("transformer", depth=config.block + 1)
        return cls(transformer, Encoders(*map(part, checkpoint.encoder_names)))

    @property
    def parts(self) -> dict[str, Any]:
        text = [each for each in self.encoders.parts if each is not self.encoders.vae]
        return {"transformer": self.transformer, "autoencoder": self.encoders.vae, "text encoders": text}


def each_program(
    config: EvaluatorConfig, checkpoint: Checkpoint, models: EvaluatorModels, mesh: Mesh, run: Run
) -> None:
    """Calls `run` for each program that a batch of images needs, in the evaluator's order.

    Args:
      config: options as `settled_config` returns them.
    """
    assert config.size is not None
    assert config.block is not None
    assert config.batch_size is not None
    batch, prompts = config.batch_size, config.prompts_per_image
    split, whole = (partial(_array, sharding=NamedSharding(mesh, spec)) for spec in (BATCH, P()))
    by_image = partial(_array, sharding=NamedSharding(mesh, P(None, *BATCH)))

    pixels = split((batch, config.size, config.size, 3), jnp.float32)
    latents = run("autoencoder", 1, encode_images, models.encoders.vae, pixels)
    ids = whole((batch, checkpoint.clip_tokens), jnp.int32)
    encode = partial(encode_prompts, joint_dim=checkpoint.transformer.joint_attention_dim)
    if config.prompts == "present":
        texts = run("text encoders", prompts, encode_prompts, models.encoders, TokenIds(ids, ids), **encode.keywords)
    else:
        texts = jax.eval_shape(encode, models.encoders, TokenIds(ids, ids))
    texts = jax.tree.map(lambda leaf: split(leaf.shape, leaf.dtype), texts)

    rows, noise = split((batch,), jnp.int32), split(latents.shape, jnp.float32)
    images = NoisedImages(latents, noise, whole((), jnp.float32), rows)
    readouts = (Readout(config.block),)
    maps = run("blocks", prompts, attention_maps, models.transformer, images, texts, readouts=readouts)
    tokens = maps.shape[2]
    scores = by_image((1, batch, config.class_rows, tokens), jnp.float32)
    averaging = split((batch, config.class_rows, maps.shape[3]), jnp.float32)
    scores = run("scores", prompts, add_scores, scores, maps, averaging, rows)

    confusion = whole((1, 1, config.classes, config.classes), jnp.int32)  # one part: no threshold of the background
    truth, sizes = whole((batch, *CANVAS), jnp.uint8), whole((batch, 2), jnp.int32)
    named, indices = whole((batch, config.class_rows), jnp.int32), whole((batch,), jnp.int32)
    run("guessers", 1, without_images, scores, indices, 0)
    grid = images.grid(checkpoint.transformer.patch_size)
    below = whole((0,), jnp.float32), whole((), jnp.int32)
    asked, how = (truth, sizes, named, *below, None), {"grid": grid, "masks": PAPERS_MASKS, "by_mean": False}
    run("counting", 3, count, confusion, scores, *asked, **how)  # the pass, and its two guessers


def _array(shape: tuple[int, ...], dtype: Any, sharding: NamedSharding) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(shape, dtype, sharding=sharding)
