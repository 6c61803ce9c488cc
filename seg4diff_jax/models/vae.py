"""Stable Diffusion 3's autoencoder (VAE): pixels to latents and back. diffusers' AutoencoderKL is the reference.

    encoder   conv in, levels from fine to coarse, middle, norm, silu, conv out: the posterior's moments
    decoder   conv in, middle, levels from coarse to fine, norm, silu, conv out: pixels
    level     residual blocks, then resampling by 2 (none after the last level)
    middle    residual block, attention over all positions (optional), residual block

Activations are [batch, height, width, channels] in the compute dtype; norm statistics and softmax are fp32.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields
from itertools import pairwise
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Float32

from seg4diff_jax.checked import Checked
from seg4diff_jax.models.kernels import Kernel, attend
from seg4diff_jax.models.stacked_layers import LayerStack

EPSILON = 1e-6
MOST_LEVELS = 8
SCORE_BYTES = 64 * 2**20
"""Most bytes of attention scores at once, for each image. All scores fit up to 4096 tokens (512 px). At 1024 px this is
an eighth of the image's largest activation in fp32. The bound is per image, so that the arithmetic does not depend on
the batch."""


@dataclass(frozen=True)
class VAEConfig(Checked):
    """The configuration of an AutoencoderKL, with diffusers' names and defaults. config.json has SD3's values."""

    in_channels: int = 3
    out_channels: int = 3
    latent_channels: int = 4
    block_out_channels: tuple[int, ...] = (64,)
    layers_per_block: int = 1
    norm_num_groups: int = 32
    mid_block_add_attention: bool = True
    use_quant_conv: bool = True
    use_post_quant_conv: bool = True
    scaling_factor: float = 0.18215
    shift_factor: float | None = None

    def problems(self) -> list[str]:
        """Returns what is wrong with the configuration, one sentence for each problem."""
        groups = self.norm_num_groups
        uneven = [width for width in self.block_out_channels if groups < 1 or width % groups]
        if not uneven:
            return []
        return [
            f"VAE config: norm_num_groups {groups} must divide every width in block_out_channels, but does not divide "
            f"{uneven}"
        ]

    @property
    def downsampling(self) -> int:
        """Pixels per latent position along one side: 8 for SD3."""
        return 2 ** (len(self.block_out_channels) - 1)

    @classmethod
    def from_json(cls, json: Mapping[str, Any]) -> VAEConfig:
        """Reads diffusers' `vae/config.json`.

        Raises ValueError, which names key and value, for a variant that is not implemented.
        """
        known = {field.name: json[field.name] for field in fields(cls) if field.name in json}
        if "block_out_channels" in known:
            known["block_out_channels"] = tuple(known["block_out_channels"])
        config = cls(**known)
        levels = len(config.block_out_channels)
        if not 1 <= levels <= MOST_LEVELS:
            raise ValueError(f"VAE config: block_out_channels has {levels} levels; expected 1 to {MOST_LEVELS}")
        implemented = {
            "_class_name": ["AutoencoderKL"],
            "act_fn": ["silu", "swish"],
            "down_block_types": [["DownEncoderBlock2D"] * levels],
            "up_block_types": [["UpDecoderBlock2D"] * levels],
            "latents_mean": [None],
            "latents_std": [None],
        }
        for key, allowed in implemented.items():
            value = list(json[key]) if isinstance(json.get(key), tuple) else json.get(key)
            if key in json and value not in allowed:
                expected = " or ".join(map(repr, allowed))
                raise ValueError(f"VAE config: {key} = {value!r:.200} is not implemented; expected {expected}")
        return config


class VAE(nnx.Module):
    """SD3's autoencoder.

    Args:
      config: the model's configuration.
      dtype: dtype of the computation, bf16 or fp32 (fp16 overflows).
      param_dtype: dtype of the parameters.
    """

    def __init__(self, config: VAEConfig, *, dtype: Any = jnp.float32, param_dtype: Any = jnp.float32, rngs: nnx.Rngs):
        options = {"dtype": dtype, "param_dtype": param_dtype, "rngs": rngs}
        latent = config.latent_channels
        self.config = config
        self.encoder = Encoder(config, **options)
        self.decoder = Decoder(config, **options)
        self.quant_conv = _pointwise(2 * latent, 2 * latent, **options) if config.use_quant_conv else None
        self.post_quant_conv = _pointwise(latent, latent, **options) if config.use_post_quant_conv else None

    @property
    def layer_stacks(self) -> tuple[LayerStack, ...]:
        return ()

    def moments(
        self, pixels: Float[Array, "batch height width in_channels"]
    ) -> tuple[
        Float[Array, "batch latent_height latent_width channels"],
        Float[Array, "batch latent_height latent_width channels"],
    ]:
        """Returns the posterior's mean and log variance (clipped to [-30, 20]) of latents before shift and scale.

        Pixels are in [-1, 1]. A side that is no multiple of `config.downsampling` is rounded down.
        """
        moments = self.encoder(pixels)
        if self.quant_conv is not None:
            moments = self.quant_conv(moments)
        mean, log_variance = jnp.split(moments, 2, axis=-1)
        return mean, jnp.clip(log_variance, -30.0, 20.0)

    def encode(
        self, pixels: Float[Array, "batch height width in_channels"]
    ) -> Float[Array, "batch latent_height latent_width channels"]:
        """Encodes pixels in [-1, 1] as the diffusion model's latents: the posterior's mean, shifted and scaled."""
        mean, _ = self.moments(pixels)
        return (mean - (self.config.shift_factor or 0.0)) * self.config.scaling_factor

    def decode(
        self, latents: Float[Array, "batch latent_height latent_width channels"]
    ) -> Float[Array, "batch height width out_channels"]:
        """Decodes the diffusion model's latents to pixels in about [-1, 1], not clipped."""
        latents = latents / self.config.scaling_factor + (self.config.shift_factor or 0.0)
        if self.post_quant_conv is not None:
            latents = self.post_quant_conv(latents)
        return self.decoder(latents)


class Encoder(nnx.Module):
    """The encoder, from pixels to the posterior's moments; see the module's docstring."""

    def __init__(self, config: VAEConfig, **options: Any):
        widths = config.block_out_channels
        groups = config.norm_num_groups
        self.conv_in = _conv(config.in_channels, widths[0], **options)
        self.levels = nnx.List(
            Level(
                Block(before, width, groups, **options),
                *(Block(width, width, groups, **options) for _ in range(config.layers_per_block - 1)),
                resample=Downsample(width, **options) if level < len(widths) - 1 else None,
            )
            for level, (before, width) in enumerate(pairwise((widths[0], *widths)))
        )
        self.middle = Middle(config, **options)
        self.norm_out = GroupNorm(widths[-1], groups, **options)
        self.conv_out = _conv(widths[-1], 2 * config.latent_channels, **options)

    def __call__(self, pixels: Float[Array, "b height width c"]) -> Float[Array, "b latent_height latent_width m"]:
        x = self.conv_in(pixels)
        for level in self.levels:
            x = level(x)
        x = self.middle(x)
        return self.conv_out(norm_silu(self.norm_out, x))


class Decoder(nnx.Module):
    """The decoder, from latents to pixels; see the module's docstring."""

    def __init__(self, config: VAEConfig, **options: Any):
        widths = config.block_out_channels[::-1]
        groups = config.norm_num_groups
        self.conv_in = _conv(config.latent_channels, widths[0], **options)
        self.middle = Middle(config, **options)
        self.levels = nnx.List(
            Level(
                Block(before, width, groups, **options),
                *(Block(width, width, groups, **options) for _ in range(config.layers_per_block)),
                resample=Upsample(width, **options) if level < len(widths) - 1 else None,
            )
            for level, (before, width) in enumerate(pairwise((widths[0], *widths)))
        )
        self.norm_out = GroupNorm(widths[-1], groups, **options)
        self.conv_out = _conv(widths[-1], config.out_channels, **options)

    def __call__(self, latents: Float[Array, "b latent_height latent_width c"]) -> Float[Array, "b height width o"]:
        x = self.conv_in(latents)
        x = self.middle(x)
        for level in self.levels:
            x = level(x)
        return self.conv_out(norm_silu(self.norm_out, x))


class Level(nnx.Module):
    """Residual blocks at one resolution, then the resampling to the next one, if there is one."""

    def __init__(self, *blocks: Block, resample: Downsample | Upsample | None):
        self.blocks = nnx.List(blocks)
        self.resample = resample

    def __call__(self, x: Float[Array, "b h w c"]) -> Float[Array, "b new_h new_w d"]:
        for block in self.blocks:
            x = block(x)
        return x if self.resample is None else self.resample(x)


class Middle(nnx.Module):
    """The layers at the coarsest resolution: residual block, optional attention over all positions, residual block."""

    def __init__(self, config: VAEConfig, **options: Any):
        width, groups = config.block_out_channels[-1], config.norm_num_groups
        self.before = Block(width, width, groups, **options)
        self.attention = Attention(width, groups, **options) if config.mid_block_add_attention else None
        self.after = Block(width, width, groups, **options)

    def __call__(self, x: Float[Array, "b h w c"]) -> Float[Array, "b h w c"]:
        x = self.before(x)
        if self.attention is not None:
            x = self.attention(x)
        return self.after(x)


class Block(nnx.Module):
    """A residual block: norm, silu and convolution, twice, plus a shortcut (a linear layer if the width changes)."""

    def __init__(self, in_channels: int, out_channels: int, groups: int, **options: Any):
        self.norm1 = GroupNorm(in_channels, groups, **options)
        self.conv1 = _conv(in_channels, out_channels, **options)
        self.norm2 = GroupNorm(out_channels, groups, **options)
        self.conv2 = _conv(out_channels, out_channels, **options)
        self.shortcut = _pointwise(in_channels, out_channels, **options) if in_channels != out_channels else None

    def __call__(self, x: Float[Array, "b h w c"]) -> Float[Array, "b h w d"]:
        hidden = self.conv1(norm_silu(self.norm1, x))
        hidden = self.conv2(norm_silu(self.norm2, hidden))
        return hidden + (x if self.shortcut is None else self.shortcut(x))


class Downsample(nnx.Module):
    """A convolution with stride 2. It pads only the bottom and the right; all other convolutions pad every side."""

    def __init__(self, channels: int, **options: Any):
        self.conv = _conv(channels, channels, strides=2, padding=((0, 1), (0, 1)), **options)

    def __call__(self, x: Float[Array, "b h w c"]) -> Float[Array, "b h//2 w//2 c"]:
        return self.conv(x)


class Upsample(nnx.Module):
    """Repeats every pixel twice in both directions, then applies a convolution."""

    def __init__(self, channels: int, **options: Any):
        self.conv = _conv(channels, channels, **options)

    def __call__(self, x: Float[Array, "b h w c"]) -> Float[Array, "b 2*h 2*w c"]:
        batch, height, width, channels = x.shape
        doubled = jnp.broadcast_to(x[:, :, None, :, None, :], (batch, height, 2, width, 2, channels))
        return self.conv(doubled.reshape(batch, 2 * height, 2 * width, channels))


class Attention(nnx.Module):
    """Self-attention over all positions with one head of the full width, added to its input."""

    def __init__(self, channels: int, groups: int, **options: Any):
        self.norm = GroupNorm(channels, groups, **options)
        self.query = _pointwise(channels, channels, **options)
        self.key = _pointwise(channels, channels, **options)
        self.value = _pointwise(channels, channels, **options)
        self.out = _pointwise(channels, channels, **options)

    def __call__(self, x: Float[Array, "b h w c"]) -> Float[Array, "b h w c"]:
        tokens = self.norm(x).astype(x.dtype).reshape(x.shape[0], -1, x.shape[-1])
        attended = chunked_attention(self.query(tokens), self.key(tokens), self.value(tokens))
        return x + self.out(attended).reshape(x.shape)


def chunked_attention(
    query: Float[Array, "b tokens c"], key: Float[Array, "b tokens c"], value: Float[Array, "b tokens c"]
) -> Float[Array, "b tokens c"]:
    """Computes softmax attention for one chunk of queries at a time, with at most SCORE_BYTES of scores per image.

    Gradients keep the bound: the backward pass computes each chunk's scores again.
    """
    kernel = Kernel("xla", query_chunk=max(1, SCORE_BYTES // (4 * query.shape[1])))
    attended, _ = attend(query[:, :, None], key[:, :, None], value[:, :, None], kernel=kernel)
    return attended[:, :, 0]


class GroupNorm(nnx.Module):
    """Normalises groups of neighbouring channels over all positions. The result is fp32: the activation rounds it.

    Moments are computed per channel, in one pass over the activations, and then pooled into groups. This is faster than
    flax's GroupNorm, which reshapes the activations.
    """

    def __init__(self, channels: int, groups: int, *, param_dtype: Any, **_: Any):
        self.scale = nnx.Param(jnp.ones(channels, param_dtype))
        self.bias = nnx.Param(jnp.zeros(channels, param_dtype))
        self.groups = groups

    def __call__(self, x: Float[Array, "b h w c"]) -> Float32[Array, "b h w c"]:
        batch, height, width, channels = x.shape
        x = x.astype(jnp.float32)
        # Moments are about one pixel's values: about zero, rounding would hide the variance of a nearly flat image.
        pivot = jax.lax.stop_gradient(x[:, height // 2, width // 2])
        offset = x - pivot[:, None, None]
        mean = offset.mean((1, 2))
        variance = jnp.maximum(jnp.square(offset).mean((1, 2)) - jnp.square(mean), 0.0)

        means = (mean + pivot).reshape(batch, self.groups, -1)
        group_mean = means.mean(-1, keepdims=True)
        group_variance = variance.reshape(means.shape).mean(-1, keepdims=True) + means.var(-1, keepdims=True)

        def per_channel(group: Float[Array, "b groups 1"]) -> Float[Array, "b 1 1 c"]:
            return jnp.broadcast_to(group, means.shape).reshape(batch, 1, 1, channels)

        gain = per_channel(jax.lax.rsqrt(group_variance + EPSILON)) * self.scale[...].astype(jnp.float32)
        return (x - per_channel(group_mean)) * gain + self.bias[...].astype(jnp.float32)


@jax.checkpoint
def norm_silu(norm: GroupNorm, x: Float[Array, "b h w c"]) -> Float[Array, "b h w c"]:
    """Applies the norm, then silu. The backward pass recomputes both from `x` alone.

    The fp32 intermediates would take several times the memory of `x`.
    """
    return nnx.silu(norm(x)).astype(x.dtype)


def _conv(in_channels: int, out_channels: int, *, padding: Any = ((1, 1), (1, 1)), **options: Any) -> nnx.Conv:
    """Makes a 3 x 3 convolution."""
    return nnx.Conv(in_channels, out_channels, (3, 3), padding=padding, **options)


def _pointwise(in_channels: int, out_channels: int, **options: Any) -> nnx.Linear:
    """Makes a 1 x 1 convolution."""
    return nnx.Linear(in_channels, out_channels, **options)
