"""MM-DiT, Stable Diffusion 3's transformer: two streams, image and text, that meet in joint attention.

diffusers' SD3Transformer2DModel is the reference. SD3.5-medium adds a second, image-only attention in its first blocks;
SD3.5-medium and -large normalise q and k. Blocks are numbered from 0; the last one does not update the text.
"""

from __future__ import annotations

import math
from collections.abc import Collection
from dataclasses import replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Int

from seg4diff_jax.models.attention import DEFAULT_OPTIONS, ForwardOptions
from seg4diff_jax.models.concepts import Concepts
from seg4diff_jax.models.conditioning import TextConditioning
from seg4diff_jax.models.sd3.block import MLP, JointBlock, StreamState, modulate
from seg4diff_jax.models.sd3.config import MMDiTConfig
from seg4diff_jax.models.stacked_layers import LayerStack, stack_layers
from seg4diff_jax.models.trunk import run_blocks
from seg4diff_jax.parallel import split_batch

TIME_FEATURES = 256


class Table(nnx.Variable):
    """A constant array that checkpoints hold and training does not change."""


def timestep_features(timesteps: Float[Array, " batch"]) -> Float[Array, "batch features"]:
    """Embeds timesteps in 0..1000: cosines, then sines, at 128 frequencies from 1 down to 1/10000 (exclusive); fp32."""
    half = TIME_FEATURES // 2
    frequencies = jnp.exp(-math.log(10000) / half * jnp.arange(half, dtype=jnp.float32))
    angles = timesteps.astype(jnp.float32)[:, None] * frequencies
    return jnp.concatenate([jnp.cos(angles), jnp.sin(angles)], axis=-1)


def sincos_table(config: MMDiTConfig) -> Float[Array, "rows columns dim"]:
    """Makes the positional table of published checkpoints, as diffusers' get_2d_sincos_pos_embed does.

    It holds sines and cosines of the column, then of the row. Positions are scaled so that the table spans
    `sample_size / patch_size`.
    """
    size, quarter = config.pos_embed_max_size, config.width // 4
    base = config.sample_size // config.patch_size
    positions = np.arange(size, dtype=np.float64) / (size / base)
    angles = positions[:, None] * 10000.0 ** (-np.arange(quarter, dtype=np.float64) / quarter)
    along = jnp.asarray(np.concatenate([np.sin(angles), np.cos(angles)], axis=-1), jnp.float32)
    # Broadcast by JAX, so that an abstract model costs no memory: SD3.5-medium's table has 226 million numbers.
    columns = jnp.broadcast_to(along[None], (size, size, 2 * quarter))
    rows = jnp.broadcast_to(along[:, None], (size, size, 2 * quarter))
    return jnp.concatenate([columns, rows], axis=-1)


class MMDiT(nnx.Module):
    """SD3's transformer: it predicts the velocity at noisy latents, and returns the attention of any block.

    Args:
      config: the model's configuration.
      depth: number of blocks to hold, from the first. With fewer than the configuration has, there is no output head:
        only `trunk.attention_at` and `trunk.attentions_at` work. Default: all blocks.
      dtype: dtype of the computation. Softmax, norms and log-normalisers are fp32 whatever it is.
      param_dtype: dtype of the parameters at initialisation.
    """

    def __init__(
        self,
        config: MMDiTConfig,
        *,
        depth: int | None = None,
        dtype: DTypeLike = jnp.float32,
        param_dtype: DTypeLike = jnp.float32,
        rngs: nnx.Rngs,
    ):
        dtypes: dict[str, Any] = {"dtype": dtype, "param_dtype": param_dtype}
        width, patch = config.width, (config.patch_size, config.patch_size)
        self.config = config
        self.depth = config.num_layers if depth is None else depth
        if not 0 < self.depth <= config.num_layers:
            raise ValueError(f"depth is {depth}; this model has 1 to {config.num_layers} blocks")
        self.patch_embed = nnx.Conv(config.in_channels, width, patch, patch, padding="VALID", rngs=rngs, **dtypes)
        self.pos_embed = Table(sincos_table(config).astype(param_dtype))
        self.time_embed = MLP((TIME_FEATURES, width, width), jax.nn.silu, rngs=rngs, **dtypes)
        self.pooled_embed = MLP((config.pooled_projection_dim, width, width), jax.nn.silu, rngs=rngs, **dtypes)
        self.context_embed = nnx.Linear(config.joint_attention_dim, width, rngs=rngs, **dtypes)
        self.stacks = nnx.List([self._stack(run, rngs, dtypes) for run in self.layer_stacks])
        if self.depth == config.num_layers:
            self.norm_out = nnx.Linear(width, 2 * width, rngs=rngs, **dtypes)
            self.proj_out = nnx.Linear(width, config.patch_size**2 * config.out_channels, rngs=rngs, **dtypes)

    def _stack(self, run: LayerStack, rngs: nnx.Rngs, dtypes: dict[str, Any]) -> JointBlock:
        dual = run.start in self.config.dual_attention_layers
        last = run.start == self.config.num_layers - 1
        return stack_layers(
            lambda rngs: JointBlock(self.config, dual=dual, last=last, rngs=rngs, **dtypes), run.stop - run.start, rngs
        )

    @property
    def layer_stacks(self) -> tuple[LayerStack, ...]:
        return self.config.layer_stacks(self.depth)

    def __call__(
        self,
        latents: Float[Array, "batch height width channels"],
        timesteps: Float[Array, " batch"],
        conditioning: TextConditioning,
        *,
        capture: Collection[int] = (),
        options: ForwardOptions = DEFAULT_OPTIONS,
    ) -> tuple[Float[Array, "batch height width out"], dict[int, Any]]:
        """Returns the velocity at noisy latents, and the attention records of the blocks in `capture`.

        Records are as the options' request reads them, by default `JointAttention`.

        Args:
          latents: noisy latents. Height and width are multiples of the patch size and fit the positional table.
          timesteps: 1000 x sigma: 0 (clean) to 1000 (noise).
          conditioning: token states and pooled states of the text encoders.
          capture: numbers of the blocks to record.
          options: what each record holds, and how blocks are computed.

        Raises:
          ValueError: a captured block does not exist, the latents do not fit, the model lacks its last blocks, or the
            text has no segment with the requested name.
        """
        if self.depth < self.config.num_layers:
            raise ValueError(
                f"this model holds blocks 0..{self.depth - 1} of {self.config.num_layers} and has no output head; "
                "load all blocks, or use attention_at or attentions_at"
            )
        missing = sorted(set(capture) - set(range(self.depth)))
        if missing:
            raise ValueError(f"cannot capture blocks {missing}: the model has blocks 0..{self.depth - 1}")
        state, vector = self.embed(latents, timesteps, conditioning)
        options = (options if capture else replace(options, request=None)).about(conditioning)
        state, records = run_blocks(self, state, vector, self.depth, capture, options)
        height, width = latents.shape[1:3]
        return self.velocity(state.image, vector, (height, width)), records

    def embed(
        self,
        latents: Float[Array, "batch height width channels"],
        timesteps: Float[Array, " batch"],
        conditioning: TextConditioning,
    ) -> tuple[StreamState, Float[Array, "batch dim"]]:
        """Returns the input of the first block, and the embedded timestep and pooled text that modulate every block."""
        dtype = self.context_embed.dtype
        patches = self.patch_embed(latents.astype(dtype))
        position = self._crop_position(patches.shape[1], patches.shape[2], latents.shape)
        image = (patches + position).astype(dtype).reshape(patches.shape[0], -1, self.config.width)
        text, vector = self._embed_text(timesteps, conditioning)
        return StreamState(image, text, conditioning.last_token_count), vector

    def embed_concepts(self, timesteps: Float[Array, " groups"], conditioning: TextConditioning) -> Concepts:
        """Returns concept tokens as the first block reads them, a group for each prompt.

        Args:
          timesteps: of each group, its image's.
        """
        return Concepts(*self._embed_text(timesteps, conditioning), conditioning.last_token_count)

    def _embed_text(
        self, timesteps: Float[Array, " batch"], conditioning: TextConditioning
    ) -> tuple[Float[Array, "batch tokens dim"], Float[Array, "batch dim"]]:
        dtype = self.context_embed.dtype
        time = self.time_embed(timestep_features(timesteps).astype(dtype))
        vector = time + self.pooled_embed(conditioning.pooled.astype(dtype))
        return self.context_embed(split_batch(conditioning.context.astype(dtype))), vector

    def _crop_position(self, rows: int, columns: int, latents: tuple[int, ...]) -> Float[Array, "rows columns dim"]:
        size, patch = self.config.pos_embed_max_size, self.config.patch_size
        if latents[1] % patch or latents[2] % patch or max(rows, columns) > size:
            raise ValueError(
                f"latents are {latents[1]} x {latents[2]}; sides must be multiples of {patch}, up to {patch * size}"
            )
        top, left = (size - rows) // 2, (size - columns) // 2
        return self.pos_embed.get_value()[top : top + rows, left : left + columns]

    def velocity(
        self, image: Float[Array, "batch tokens dim"], vector: Float[Array, "batch dim"], size: tuple[int, int]
    ) -> Float[Array, "batch height width out"]:
        """Applies the output head: turns image states after the last block into the velocity.

        `size` is the height and width of the latents.
        """
        return self._unpatchify(self.patch_velocity(image, vector), *size)

    def patch_velocity(
        self, image: Float[Array, "batch tokens dim"], vector: Float[Array, "batch dim"]
    ) -> Float[Array, "batch tokens patch"]:
        """Returns the velocity of each image token's patch, as one axis of (row, column, channel)."""
        shift, scale = jnp.split(self.norm_out(split_batch(jax.nn.silu(vector))), 2, axis=-1)
        return self.proj_out(modulate(image, shift, scale))

    def _unpatchify(self, patches: Float[Array, "batch tokens features"], height: int, width: int):
        patch, channels = self.config.patch_size, self.config.out_channels
        grid = patches.reshape(-1, height // patch, width // patch, patch, patch, channels)
        return grid.transpose(0, 1, 3, 2, 4, 5).reshape(-1, height, width, channels)


def patchify(latents: Float[Array, "batch height width channels"], patch: int) -> Float[Array, "batch tokens features"]:
    """Cuts latents into the patches of the image tokens, in the layout in which `velocity_at` predicts them.

    Rows, columns and channels of a patch are one axis, in this order.
    """
    batch, height, width, channels = latents.shape
    grid = latents.reshape(batch, height // patch, patch, width // patch, patch, channels)
    return grid.transpose(0, 1, 3, 2, 4, 5).reshape(batch, -1, patch * patch * channels)


def velocity_at(
    mmdit: MMDiT,
    latents: Float[Array, "batch height width channels"],
    timesteps: Float[Array, " batch"],
    conditioning: TextConditioning,
    *,
    tokens: Int[Array, "batch kept"],
    options: ForwardOptions = DEFAULT_OPTIONS,
) -> Float[Array, "batch kept patch"]:
    """Returns the velocity of the patches of some image tokens. The model sees no other image tokens.

    With all tokens in their order, this is the velocity of `MMDiT.__call__`. The model must hold all blocks.

    Args:
      tokens: numbers of the tokens, counted along rows. Each token keeps its position in the whole image.

    Other arguments are as for `MMDiT.__call__`.
    """
    state, vector = mmdit.embed(latents, timesteps, conditioning)
    state = replace(state, image=jnp.take_along_axis(state.image, tokens[..., None], axis=1))
    state, _ = run_blocks(mmdit, state, vector, mmdit.depth, (), options)
    return mmdit.patch_velocity(state.image, vector)
