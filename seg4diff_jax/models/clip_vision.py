"""CLIP's vision encoder with its projection. transformers' CLIPVisionModelWithProjection is the reference."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import jax.numpy as jnp
from flax import nnx
from jax.typing import DTypeLike
from jaxtyping import Array, Float

from seg4diff_jax.models.clip import CLIPBlock, check_layers, layer_norm
from seg4diff_jax.models.stacked_layers import LayerStack, scan_layers, stack_layers
from seg4diff_jax.parallel import split_batch


@dataclass(frozen=True)
class CLIPVisionConfig:
    """The configuration of a CLIP vision encoder, with transformers' names and defaults."""

    hidden_size: int = 768
    intermediate_size: int = 3072
    num_hidden_layers: int = 12
    num_attention_heads: int = 12
    num_channels: int = 3
    image_size: int = 224
    patch_size: int = 32
    hidden_act: str = "quick_gelu"
    layer_norm_eps: float = 1e-5
    projection_dim: int = 512

    @classmethod
    def from_json(cls, config: dict[str, Any]) -> CLIPVisionConfig:
        """Reads a transformers `image_encoder/config.json`. Raises ValueError for a value that is not implemented."""
        parsed = cls(**{name: config[name] for name in cls.__dataclass_fields__ if name in config})
        check_layers(parsed)
        return parsed

    @property
    def patches(self) -> int:
        """Number of patches of an image."""
        return (self.image_size // self.patch_size) ** 2


class CLIPVision(nnx.Module):
    """CLIP's vision encoder: returns one projected state of the whole picture. Every patch attends to all patches."""

    def __init__(
        self,
        config: CLIPVisionConfig,
        *,
        dtype: DTypeLike = jnp.float32,
        param_dtype: DTypeLike = jnp.float32,
        rngs: nnx.Rngs,
    ):
        width, patch = config.hidden_size, (config.patch_size, config.patch_size)
        dtypes: dict[str, Any] = {"dtype": dtype, "param_dtype": param_dtype}
        self.config = config
        self.class_embedding = nnx.Param(nnx.initializers.normal(width**-0.5)(rngs.params(), (width,), param_dtype))
        self.patch_embedding = nnx.Conv(
            config.num_channels, width, patch, patch, padding="VALID", use_bias=False, rngs=rngs, **dtypes
        )
        self.position_embedding = nnx.Embed(config.patches + 1, width, param_dtype=param_dtype, rngs=rngs)
        self.first_norm = layer_norm(config, param_dtype, rngs)
        self.blocks = stack_layers(
            lambda rngs: CLIPBlock(config, causal=False, **dtypes, rngs=rngs), config.num_hidden_layers, rngs
        )
        self.final_norm = layer_norm(config, param_dtype, rngs)
        self.projection = nnx.Linear(width, config.projection_dim, use_bias=False, **dtypes, rngs=rngs)

    @property
    def layer_stacks(self) -> tuple[LayerStack, ...]:
        return (LayerStack("blocks", "blocks", 0, self.config.num_hidden_layers),)

    def __call__(self, pixels: Float[Array, "batch height width channels"]) -> Float[Array, "batch projection"]:
        """Projects pictures into the space of the text encoder's `pooled`.

        Pixels are normalised as in the encoder's training: for the published ones by CLIP's mean and standard deviation
        of each channel. Raises ValueError for pixels that are not of the configured size.
        """
        size = self.config.image_size
        if pixels.shape[1:3] != (size, size):
            raise ValueError(f"pixels are {pixels.shape[1]} x {pixels.shape[2]}; this CLIP sees {size} x {size}")
        patches = self.patch_embedding(pixels).reshape(len(pixels), -1, self.config.hidden_size).astype(jnp.float32)
        first = jnp.broadcast_to(self.class_embedding[...].astype(jnp.float32), (len(pixels), 1, patches.shape[-1]))
        x = jnp.concatenate([first, patches], axis=1) + self.position_embedding.embedding[...]
        x, _ = scan_layers(lambda state, block: (block(state), None), self.first_norm(x), self.blocks)
        return self.projection(split_batch(self.final_norm(x[:, 0])))
