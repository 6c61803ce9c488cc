"""The vision transformers of DINO and DINOv2, which see pictures without a text.

transformers' ViTModel and Dinov2Model are the references.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.typing import DTypeLike
from jaxtyping import Array, Float

from seg4diff_jax.models.clip import CLIPBlock, LayerConfig, check_layers, layer_norm
from seg4diff_jax.models.stacked_layers import LayerStack, scan_layers, stack_layers
from seg4diff_jax.parallel import split_batch

CUBIC = -0.75
"""The parameter of PyTorch's bicubic kernel: its slope one pixel from the middle."""


@dataclass(frozen=True)
class DINOConfig:
    """The configuration of a DINO or DINOv2, with transformers' names and the defaults of its ViTConfig.

    `model_type` is `vit` or `dinov2`. DINOv2's files give `mlp_ratio` in place of `intermediate_size`.
    """

    model_type: str = "vit"
    hidden_size: int = 768
    intermediate_size: int = 3072
    mlp_ratio: int = 4
    num_hidden_layers: int = 12
    num_attention_heads: int = 12
    num_channels: int = 3
    image_size: int = 224
    patch_size: int = 16
    hidden_act: str = "gelu"
    layer_norm_eps: float = 1e-12
    qkv_bias: bool = True
    use_swiglu_ffn: bool = False

    @classmethod
    def from_json(cls, config: dict[str, Any]) -> DINOConfig:
        """Reads transformers' `config.json`. Raises ValueError for a value that is not implemented."""
        parsed = cls(**{name: config[name] for name in cls.__dataclass_fields__ if name in config})
        if "model_type" not in config or parsed.model_type not in ("vit", "dinov2"):
            raise ValueError(f"model_type is {config.get('model_type')!r:.80}; implemented: vit (DINO), dinov2")
        if parsed.has_layer_scale:
            absent = {"layer_norm_eps": 1e-6, "patch_size": 14}
            changes = {name: value for name, value in absent.items() if name not in config}
            parsed = replace(parsed, intermediate_size=parsed.hidden_size * parsed.mlp_ratio, **changes)
            if parsed.use_swiglu_ffn:
                raise ValueError("use_swiglu_ffn is True, as in DINOv2's giant; implemented: False")
        if not parsed.qkv_bias:
            raise ValueError("qkv_bias is False; implemented: True")
        if parsed.image_size < parsed.patch_size:
            raise ValueError(f"image_size is {parsed.image_size}; expected at least patch_size = {parsed.patch_size}")
        check_layers(parsed)
        return parsed

    @property
    def has_layer_scale(self) -> bool:
        return self.model_type == "dinov2"

    @property
    def grid(self) -> int:
        """Number of patches along one side of a picture of the configured size."""
        return self.image_size // self.patch_size


class LayerScaleBlock(CLIPBlock):
    """DINOv2's layer: CLIP's, with a factor for each channel of what attention and MLP add (LayerScale)."""

    def __init__(
        self,
        config: LayerConfig,
        *,
        causal: bool = False,
        dtype: DTypeLike,
        param_dtype: DTypeLike,
        rngs: nnx.Rngs,
    ):
        super().__init__(config, causal=causal, dtype=dtype, param_dtype=param_dtype, rngs=rngs)
        self.attention_scale = nnx.Param(jnp.ones(config.hidden_size, param_dtype))
        self.mlp_scale = nnx.Param(jnp.ones(config.hidden_size, param_dtype))

    def __call__(self, x: Float[Array, "batch tokens width"]) -> Float[Array, "batch tokens width"]:
        x = x + self.attention_scale[...] * self.attention(self.attention_norm(x), causal=self.causal)
        return x + self.mlp_scale[...] * self.mlp(x)


class DINO(nnx.Module):
    """DINO or DINOv2: returns the class token of the last layer norm, one state of the whole picture."""

    def __init__(
        self,
        config: DINOConfig,
        *,
        dtype: DTypeLike = jnp.float32,
        param_dtype: DTypeLike = jnp.float32,
        rngs: nnx.Rngs,
    ):
        width, patch = config.hidden_size, (config.patch_size, config.patch_size)
        dtypes: dict[str, Any] = {"dtype": dtype, "param_dtype": param_dtype}
        embedding = nnx.initializers.normal(0.02)
        block = LayerScaleBlock if config.has_layer_scale else CLIPBlock
        self.config = config
        self.class_token = nnx.Param(embedding(rngs.params(), (1, 1, width), param_dtype))
        self.position_embedding = nnx.Param(embedding(rngs.params(), (1, config.grid**2 + 1, width), param_dtype))
        self.patch_embedding = nnx.Conv(config.num_channels, width, patch, patch, padding="VALID", rngs=rngs, **dtypes)
        self.blocks = stack_layers(
            lambda rngs: block(config, causal=False, **dtypes, rngs=rngs), config.num_hidden_layers, rngs
        )
        self.final_norm = layer_norm(config, param_dtype, rngs)

    @property
    def layer_stacks(self) -> tuple[LayerStack, ...]:
        return (LayerStack("blocks", "blocks", 0, self.config.num_hidden_layers),)

    def __call__(self, pixels: Float[Array, "batch height width channels"]) -> Float[Array, "batch features"]:
        """Embeds pictures, fp32. Position embeddings are resampled if pictures do not have the configured size.

        Pixels are normalised as in the model's training. Raises ValueError for sides that patches do not fill.
        """
        patch = self.config.patch_size
        height, width = pixels.shape[1:3]
        if height % patch or width % patch:
            raise ValueError(f"pixels are {height} x {width}; sides must be multiples of the patch size, {patch}")
        patches = self.patch_embedding(pixels).reshape(len(pixels), -1, self.config.hidden_size).astype(jnp.float32)
        first = jnp.broadcast_to(self.class_token[...].astype(jnp.float32), (len(pixels), 1, patches.shape[-1]))
        x = jnp.concatenate([first, patches], axis=1) + self.positions(height // patch, width // patch)
        x, _ = scan_layers(lambda state, block: (block(state), None), x, self.blocks)
        return self.final_norm(split_batch(x[:, 0]))

    def positions(self, rows: int, columns: int) -> Float[Array, "1 tokens features"]:
        """Returns the position embeddings of the class token and of a grid of patches, resampled by bicubic, fp32."""
        table, grid = self.position_embedding[...].astype(jnp.float32), self.config.grid
        if (rows, columns) == (grid, grid):
            return table
        own = table[0, 1:].reshape(grid, grid, -1)
        down, across = bicubic_matrix(grid, rows), bicubic_matrix(grid, columns)
        resampled = jnp.einsum("hr,rcf,wc->hwf", down, own, across, precision="highest")
        return jnp.concatenate([table[:, :1], resampled.reshape(1, rows * columns, -1)], axis=1)


def bicubic_matrix(source: int, target: int) -> Float[np.ndarray, "target source"]:
    """Returns the weights of bicubic resampling along one axis: row i holds those of output i.

    As PyTorch's `interpolate` with `mode="bicubic"` and `align_corners=False`: not antialiased, the border repeated.
    """
    position = (np.arange(target) + 0.5) * source / target - 0.5
    below = np.floor(position)
    weights = np.zeros((target, source))
    for tap in (-1, 0, 1, 2):
        distance = np.abs(position - below - tap)
        near = (CUBIC + 2) * distance**3 - (CUBIC + 3) * distance**2 + 1
        far = CUBIC * (distance**3 - 5 * distance**2 + 8 * distance - 4)
        column = np.clip(below + tap, 0, source - 1).astype(int)
        np.add.at(weights, (np.arange(target), column), np.where(distance <= 1, near, far))
    return weights.astype(np.float32)
