"""The encoder of T5 version 1.1 (gated GELU), which Stable Diffusion 3 uses at its XXL size.

transformers' T5EncoderModel is the reference, called with ids and no mask, as diffusers' SD3 pipeline calls it. Pad
tokens are attended to like any other.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Int

from seg4diff_jax.models.self_attention import SelfAttention
from seg4diff_jax.models.stacked_layers import LayerStack, scan_layers, stack_layers
from seg4diff_jax.parallel import split_batch

IMPLEMENTED = {"feed_forward_proj": "gated-gelu", "dense_act_fn": "gelu_new", "is_decoder": False}


@dataclass(frozen=True)
class T5Config:
    """The configuration of the encoder, with transformers' names and defaults."""

    vocab_size: int = 32128
    d_model: int = 512
    d_kv: int = 64
    d_ff: int = 2048
    num_layers: int = 6
    num_heads: int = 8
    relative_attention_num_buckets: int = 32
    relative_attention_max_distance: int = 128
    layer_norm_epsilon: float = 1e-6

    @classmethod
    def from_json(cls, config: dict[str, Any]) -> T5Config:
        """Reads transformers' `text_encoder_3/config.json`. Raises ValueError for a variant that is not implemented."""
        # The default of transformers is T5 version 1.0, whose feed-forward layer has no gate.
        found = {"feed_forward_proj": "relu", **config}
        for name, implemented in IMPLEMENTED.items():
            if found.get(name, implemented) != implemented:
                raise ValueError(f"{name} is {found[name]!r:.80}; T5 version 1.1's {implemented!r} is implemented")
        parsed = cls(**{name: config[name] for name in cls.__dataclass_fields__ if name in config})
        if parsed.relative_attention_max_distance <= parsed.relative_attention_num_buckets // 4:
            raise ValueError(
                f"relative_attention_max_distance is {parsed.relative_attention_max_distance}; expected more than a "
                f"quarter of relative_attention_num_buckets = {parsed.relative_attention_num_buckets}"
            )
        return parsed


def relative_buckets(tokens: int, buckets: int, max_distance: int) -> Int[np.ndarray, "tokens tokens"]:
    """Returns the bucket of every (query, key) pair, by their distance.

    Keys after the query have the upper half of the buckets. In each half, the first half of the buckets hold one
    distance each. The others widen logarithmically up to `max_distance`, and the last holds everything beyond. This
    is computed on the host, since a device could round the logarithm otherwise and move a distance to another bucket.
    """
    position = np.arange(tokens)
    offset = position[None, :] - position[:, None]
    half, exact = buckets // 2, buckets // 4
    distance = np.abs(offset)
    growth = np.log(np.maximum(distance, exact) / exact) / math.log(max_distance / exact)
    wide = exact + (growth * (half - exact)).astype(np.int32)
    bucket = np.where(distance < exact, distance, np.minimum(wide, half - 1))
    return (bucket + half * (offset > 0)).astype(np.int32)


class T5Block(nnx.Module):
    """One layer: pre-norm attention and gated feed-forward layer on a residual stream in fp32.

    T5's residual stream overflows fp16 and loses digits in bf16. The reference keeps `wo` (our `down`) in fp32 when
    the rest is fp16. Here, products that are added to the stream are accumulated and added in fp32, in any dtype.
    """

    def __init__(self, config: T5Config, *, dtype: DTypeLike, param_dtype: DTypeLike, rngs: nnx.Rngs):
        width, wide = config.d_model, config.d_ff
        dtypes = {"dtype": dtype, "param_dtype": param_dtype, "rngs": rngs}
        self.attention_norm = rms_norm(config, param_dtype, rngs)
        self.attention = SelfAttention(width, config.num_heads, config.d_kv, use_bias=False, **dtypes)
        self.mlp_norm = rms_norm(config, param_dtype, rngs)
        self.gate, self.up = (nnx.Linear(width, wide, use_bias=False, **dtypes) for _ in range(2))
        self.down = nnx.Linear(wide, width, use_bias=False, preferred_element_type=jnp.float32, **dtypes)

    def __call__(
        self, x: Float[Array, "batch tokens width"], bias: Float[Array, "heads tokens tokens"]
    ) -> Float[Array, "batch tokens width"]:
        x = x + self.attention(self.attention_norm(x), scale=1.0, bias=bias)
        h = split_batch(self.mlp_norm(x))
        return x + split_batch(self.down(jax.nn.gelu(self.gate(h), approximate=True) * self.up(h)))


def rms_norm(config: T5Config, param_dtype: DTypeLike, rngs: nnx.Rngs) -> nnx.RMSNorm:
    """Makes an RMS norm in fp32."""
    return nnx.RMSNorm(
        config.d_model, epsilon=config.layer_norm_epsilon, dtype=jnp.float32, param_dtype=param_dtype, rngs=rngs
    )


class T5Encoder(nnx.Module):
    """T5's encoder: turns token ids into states.

    All layers share one relative position bias. q.k is not scaled, and no token is masked.
    """

    def __init__(
        self,
        config: T5Config,
        *,
        dtype: DTypeLike = jnp.float32,
        param_dtype: DTypeLike = jnp.float32,
        rngs: nnx.Rngs,
    ):
        self.config = config
        self.dtype = dtype
        self.token_embedding = nnx.Embed(config.vocab_size, config.d_model, param_dtype=param_dtype, rngs=rngs)
        self.position_bias = nnx.Embed(
            config.relative_attention_num_buckets, config.num_heads, param_dtype=param_dtype, rngs=rngs
        )
        self.blocks = stack_layers(
            lambda rngs: T5Block(config, dtype=dtype, param_dtype=param_dtype, rngs=rngs), config.num_layers, rngs
        )
        self.final_norm = rms_norm(config, param_dtype, rngs)

    @property
    def layer_stacks(self) -> tuple[LayerStack, ...]:
        return (LayerStack("blocks", "blocks", 0, self.config.num_layers),)

    def __call__(self, ids: Int[Array, "batch tokens"]) -> Float[Array, "batch tokens width"]:
        """Returns states after the final norm, [batch, tokens, d_model], in the compute dtype. Any number of tokens."""
        x = jnp.take(self.token_embedding.embedding[...], ids, axis=0).astype(jnp.float32)
        bias = self.relative_bias(ids.shape[1])
        x, _ = scan_layers(lambda x, block: (block(x, bias), None), x, self.blocks)
        return self.final_norm(x).astype(self.dtype)

    def relative_bias(self, tokens: int) -> Float[Array, "heads tokens tokens"]:
        """Returns the bias of every head, query and key, fp32."""
        config = self.config
        buckets = relative_buckets(
            tokens, config.relative_attention_num_buckets, config.relative_attention_max_distance
        )
        return self.position_bias.embedding[buckets].astype(jnp.float32).transpose(2, 0, 1)
