"""Counts the floating-point operations of the models, from their configurations alone.

A multiply-add counts as two operations. Counted are products with weights, attention's two products and convolutions;
all else is a small part of a percent. Counts are for one image, and only of what is needed: a kernel that computes
scores again in the backward pass, or pads its tiles, does more.

For SD3-medium at 1024 px (4096 image and 154 text tokens) a block takes 0.352e12 and the whole model 8.437e12.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import pairwise
from typing import Literal, NamedTuple

from seg4diff_jax.models.clip import CLIPTextConfig
from seg4diff_jax.models.lora import LoRAConfig
from seg4diff_jax.models.sd3.block import MODULATIONS
from seg4diff_jax.models.sd3.config import MMDiTConfig
from seg4diff_jax.models.sd3.model import TIME_FEATURES
from seg4diff_jax.models.t5 import T5Config
from seg4diff_jax.models.vae import VAEConfig

Remat = Literal["nothing", "blocks", "all_but_matmuls"]


class StepFlops(NamedTuple):
    """Operations of a training step for one image.

    Attributes:
      forward, backward: operations that the loss and the gradients of the trained parameters need.
      again: operations of what is computed a second time to save memory (gradient checkpointing).
    """

    forward: int
    backward: int
    again: int

    @property
    def needed(self) -> int:
        """Operations without those of gradient checkpointing."""
        return self.forward + self.backward

    @property
    def done(self) -> int:
        """All operations, those of gradient checkpointing included."""
        return self.forward + self.backward + self.again


def linear_layers(config: MMDiTConfig, block: int) -> dict[str, tuple[int, int]]:
    """Returns the input and output width of every linear layer of a block, by the layer's path in the block."""
    width, last = config.width, block == config.num_layers - 1
    kinds = {"image": "dual" if block in config.dual_attention_layers else "joint"}
    kinds["text"] = "keys only" if last else "joint"
    layers: dict[str, tuple[int, int]] = {}
    for stream, kind in kinds.items():
        layers[f"{stream}.modulation"] = (width, MODULATIONS[kind] * width)
        attentions = ["attention", *(["dual_attention"] if kind == "dual" else [])]
        names = ("q", "k", "v") if kind == "keys only" else ("q", "k", "v", "out")
        layers |= {f"{stream}.{attention}.{name}": (width, width) for attention in attentions for name in names}
        if kind != "keys only":
            layers |= {f"{stream}.mlp.up": (width, 4 * width), f"{stream}.mlp.down": (4 * width, width)}
    return layers


def block_flops(config: MMDiTConfig, block: int, image: int, text: int) -> int:
    """Counts the forward pass of one block over `image` and `text` tokens."""
    weights = _weights(linear_layers(config, block), image, text)
    return weights + block_attention_flops(config, block, image, text)


def block_attention_flops(config: MMDiTConfig, block: int, image: int, text: int) -> int:
    """Counts the products of queries with keys and of weights with values, in both attentions if there are two."""
    dual = image**2 if block in config.dual_attention_layers else 0
    return 4 * config.width * ((image + text) ** 2 + dual)


def mmdit_flops(config: MMDiTConfig, image: int, text: int) -> int:
    """Counts the forward pass of the whole transformer, embeddings and output head included.

    Args:
      image: number of image tokens: latent height x width / patch_size^2.
      text: number of text tokens that are computed. Equal tokens at the end count as one (`TextConditioning`).
    """
    blocks = sum(block_flops(config, block, image, text) for block in range(config.num_layers))
    return embedding_flops(config, image, text) + blocks + head_flops(config, image)


def embedding_flops(config: MMDiTConfig, image: int, text: int) -> int:
    """Counts the embedding of patches, of the context, and of the timestep and pooled text."""
    width, channels = config.width, config.patch_size**2 * config.in_channels
    conditioning = TIME_FEATURES + config.pooled_projection_dim + 2 * width
    return 2 * width * (conditioning + image * channels + text * config.joint_attention_dim)


def head_flops(config: MMDiTConfig, image: int) -> int:
    """Counts the output head: from the last block's image states to the velocity."""
    return 2 * config.width * (2 * config.width + image * config.patch_size**2 * config.out_channels)


def maps_flops(config: MMDiTConfig, image: int, text: int) -> int:
    """Counts a block's image-to-text attention as `trunk.attention_at` computes it: image queries with all keys."""
    width = config.width
    weights = 2 * width**2 * (2 * image + text + 4)  # the 4 are the scales and shifts of both streams
    return weights + 2 * image * (image + text) * width


def adapter_step_flops(
    config: MMDiTConfig,
    lora: LoRAConfig,
    image: int,
    text: int,
    *,
    mapped: int = 0,
    remat: Remat = "nothing",
) -> StepFlops:
    """Counts a training step of adapters on a frozen checkpoint, without the mask losses.

    The backward pass of a frozen layer is one product, of its output's gradient with its weights; that of a trained
    layer is two. Gradients go back to the first adapted block, and through all of that block.

    Args:
      mapped: number of text tokens whose image-to-text scores one block returns for masks.
      remat: what is computed again in the backward pass. "blocks": every block, except the second layers of the MLPs,
        whose outputs no gradient needs. "all_but_matmuls": attention alone.
    """
    maps = 2 * image * mapped * config.width
    forward, again = embedding_flops(config, image, text) + head_flops(config, image) + maps, 0
    backward = _linear("image", (config.width, config.patch_size**2 * config.out_channels), image, text) + 2 * maps
    adapted = range(config.num_layers) if lora.blocks is None else lora.blocks
    for block in range(config.num_layers):
        layers = linear_layers(config, block)
        targets = [path for path in lora.targets if path in layers] if block in adapted else []
        attention = block_attention_flops(config, block, image, text)
        weights, own = _weights(layers, image, text), _adapters(layers, targets, lora.rank, image, text)
        forward += weights + attention + own
        if block < min(adapted):
            continue
        # Modulation layers are frozen, and their input does not depend on trained parameters: they have no backward.
        moving = {path: sides for path, sides in layers.items() if not path.endswith("modulation")}
        backward += _weights(moving, image, text) + 2 * attention + 2 * own
        if remat == "blocks":
            again += weights + attention + own - _last_products(layers, targets, lora.rank, image, text)
        elif remat == "all_but_matmuls":
            again += attention
    return StepFlops(forward, backward, again)


def vae_encoder_flops(config: VAEConfig, height: int, width: int) -> int:
    """Counts the encoding of `height` x `width` pixels to latents."""
    widths = config.block_out_channels
    pixels = height * width
    total = _conv(pixels, config.in_channels, widths[0])
    for level, (before, after) in enumerate(pairwise((widths[0], *widths))):
        total += _residual(pixels, before, after) + (config.layers_per_block - 1) * _residual(pixels, after, after)
        if level < len(widths) - 1:
            pixels //= 4
            total += _conv(pixels, after, after)
    deepest = widths[-1]
    total += 2 * _residual(pixels, deepest, deepest)
    if config.mid_block_add_attention:
        total += 8 * pixels * deepest**2 + 4 * pixels**2 * deepest
    moments = 2 * config.latent_channels
    total += _conv(pixels, deepest, moments)
    return total + (2 * pixels * moments**2 if config.use_quant_conv else 0)


def clip_text_flops(config: CLIPTextConfig, tokens: int) -> int:
    """Counts the text encoder's layers, and the projection of one token."""
    width = config.hidden_size
    layer = 2 * tokens * (4 * width**2 + 2 * width * config.intermediate_size) + 4 * tokens**2 * width
    return config.num_hidden_layers * layer + 2 * width * config.projection_dim


def t5_flops(config: T5Config, tokens: int) -> int:
    """Counts the encoder's layers."""
    inner = config.num_heads * config.d_kv
    layer = 2 * tokens * (4 * config.d_model * inner + 3 * config.d_model * config.d_ff) + 4 * tokens**2 * inner
    return config.num_layers * layer


# ---- parts ----------------------------------------------------------------------------------------------------------


def _linear(path: str, sides: tuple[int, int], image: int, text: int) -> int:
    """Counts one linear layer. Modulation is computed once for an image, not for each of its tokens."""
    tokens = 1 if path.endswith("modulation") else image if path.startswith("image") else text
    return 2 * tokens * sides[0] * sides[1]


def _weights(layers: Mapping[str, tuple[int, int]], image: int, text: int) -> int:
    return sum(_linear(path, sides, image, text) for path, sides in layers.items())


def _adapters(layers: Mapping[str, tuple[int, int]], targets: Sequence[str], rank: int, image: int, text: int) -> int:
    """Counts the products with both factors of the adapters."""
    return sum(_linear(path, (rank, sum(layers[path])), image, text) for path in targets)


def _last_products(
    layers: Mapping[str, tuple[int, int]], targets: Sequence[str], rank: int, image: int, text: int
) -> int:
    """Counts the products of the MLPs' second layers, and of their adapters' second factors.

    The block only adds these results to its states, so no gradient needs them.
    """
    last = {path: sides for path, sides in layers.items() if path.endswith("mlp.down")}
    adapted = sum(_linear(path, (rank, last[path][1]), image, text) for path in last if path in targets)
    return _weights(last, image, text) + adapted


def _conv(pixels: int, before: int, after: int) -> int:
    """Counts a 3 x 3 convolution with this many output pixels."""
    return 2 * 9 * pixels * before * after


def _residual(pixels: int, before: int, after: int) -> int:
    shortcut = 2 * pixels * before * after if before != after else 0
    return _conv(pixels, before, after) + _conv(pixels, after, after) + shortcut
