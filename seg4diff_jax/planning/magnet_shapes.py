"""MAGNET's model and batch as shapes only: the shapes of what `magnet.task` makes from a checkpoint and pictures."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import Mesh, NamedSharding

from seg4diff_jax.checkpoints import Checkpoint
from seg4diff_jax.convert.components import abstract_model
from seg4diff_jax.data.loader import Batch
from seg4diff_jax.magnet import adapter_files
from seg4diff_jax.magnet.items import T5_LENGTH
from seg4diff_jax.magnet.task import Magnet, MagnetConfig, check, image_size
from seg4diff_jax.models.encoders import Encoders
from seg4diff_jax.parallel import BATCH
from seg4diff_jax.planning.checkpoints import describe
from seg4diff_jax.planning.placement import placed


def described(config: MagnetConfig) -> Checkpoint:
    """Does what `open_checkpoint` does, for checkpoints that may lack weights and tokenizers; same errors."""
    source = describe(config.model)
    configs = {name: value for name, value in source.configs.items() if config.t5 or name != source.family.t5}
    return check(config, Checkpoint(replace(source, configs=configs), None))


def abstract_magnet(config: MagnetConfig, checkpoint: Checkpoint, mesh: Mesh) -> Magnet:
    """Returns the model that `magnet.task.init` makes, as shape, dtype and sharding of every parameter."""
    component = lambda name: abstract_model(name, checkpoint.source.configs[name], jnp.dtype(config.dtype))
    encoders = None
    if config.cache is None:
        parts: Any = [component(name) for name in checkpoint.encoder_names]
        encoders = Encoders(*parts)

    def build(transformer: Any, encoders: Encoders | None) -> Magnet:
        with_head = config.objective.mask_head is not None
        # Adapters from a file have the same shapes as fresh ones.
        adapted, head = adapter_files.begin(transformer, config.lora, None, with_head=with_head, seed=0)
        return Magnet(adapted, head, encoders)

    return placed(nnx.eval_shape(build, component("transformer"), encoders), mesh)


def item_shapes(config: MagnetConfig, checkpoint: Checkpoint) -> dict[str, tuple[tuple[int, ...], Any]]:
    """Returns shape and dtype of each field of a training item, see `magnet.items` and `magnet.encoded_items`.

    `positions: release` needs the number of tokens of the longest class name, which is not known without tokenizers.
    The length of a prompt is used for it.
    """
    size, rows, tokens = image_size(config, checkpoint), config.data.rows, checkpoint.clip_tokens
    ids = {"clip_l": ((tokens,), jnp.int32), "clip_g": ((tokens,), jnp.int32)}
    if config.t5:
        ids["t5"] = ((T5_LENGTH,), jnp.int32)
    if config.objective.targets == "matching":
        masks = {"masks": ((rows, size, size // 8), jnp.uint8), "real": ((rows,), jnp.bool_)}
    else:
        masks = {
            "labels": ((size, size), jnp.uint8),
            "class_of_row": ((rows,), jnp.uint8),
            "averaging": ((rows, tokens), jnp.float32),
        }
        if config.positions == "release":
            masks["name_ids"] = ((rows, tokens), jnp.int32)
    index = {"index": ((), jnp.int32)}
    if config.cache is None:
        return {"image": ((size, size, 3), jnp.uint8), **ids, **masks, **index}
    return {**_encoded(checkpoint, size), "clip_l": ids["clip_l"], **masks, **index}


def _encoded(checkpoint: Checkpoint, size: int) -> dict[str, tuple[tuple[int, ...], Any]]:
    vae, towers = checkpoint.vae, [checkpoint.configs[name] for name in checkpoint.family.clips]
    side = size // vae.downsampling
    states = (checkpoint.clip_tokens, sum(tower.hidden_size for tower in towers))
    if checkpoint.t5:
        states = (checkpoint.clip_tokens + T5_LENGTH, checkpoint.configs[checkpoint.family.t5].d_model)
    return {
        "latents": ((side, side, vae.latent_channels), jnp.float16),
        "states": (states, jnp.float16),
        "pooled": ((sum(tower.projection_dim for tower in towers),), jnp.float16),
    }


def abstract_batch(config: MagnetConfig, checkpoint: Checkpoint, mesh: Mesh) -> Batch:
    place = NamedSharding(mesh, BATCH)
    batch = lambda shape, dtype: jax.ShapeDtypeStruct((config.run.batch_size, *shape), dtype, sharding=place)
    return {name: batch(*each) for name, each in item_shapes(config, checkpoint).items()}
