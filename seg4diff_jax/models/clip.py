"""CLIP's text encoder with its projection, as in Stable Diffusion 3: OpenAI's ViT-L/14 and OpenCLIP's ViT-bigG/14.

transformers' CLIPTextModelWithProjection is the reference.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple, Protocol, runtime_checkable

import jax
import jax.numpy as jnp
from flax import nnx
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Int

from seg4diff_jax.models.self_attention import SelfAttention
from seg4diff_jax.models.stacked_layers import LayerStack, scan_layers, stack_layers
from seg4diff_jax.parallel import split_batch

LEGACY_EOS = 2
"""The end token's id in some published configurations, which is not the tokenizer's. For these, transformers takes the
position of the largest id as the end of the text."""


def quick_gelu(x: Array) -> Array:
    """Applies OpenAI's approximation of GELU: x sigmoid(1.702 x)."""
    return x * jax.nn.sigmoid(1.702 * x)


ACTIVATIONS: dict[str, Callable[[Array], Array]] = {
    "quick_gelu": quick_gelu,
    "gelu": partial(jax.nn.gelu, approximate=False),
}


@runtime_checkable
class LayerConfig(Protocol):
    """The values of a configuration that the layers of a text or vision encoder read."""

    @property
    def hidden_size(self) -> int: ...
    @property
    def intermediate_size(self) -> int: ...
    @property
    def num_attention_heads(self) -> int: ...
    @property
    def hidden_act(self) -> str: ...
    @property
    def layer_norm_eps(self) -> float: ...


def check_layers(config: LayerConfig) -> None:
    """Raises ValueError, which names key and value, for layers that are not implemented."""
    if config.hidden_act not in ACTIVATIONS:
        raise ValueError(f"hidden_act is {config.hidden_act!r:.80}; implemented: {', '.join(ACTIVATIONS)}")
    if config.hidden_size % config.num_attention_heads:
        raise ValueError(
            f"hidden_size is {config.hidden_size}; it must be a multiple of num_attention_heads "
            f"= {config.num_attention_heads}"
        )


@dataclass(frozen=True)
class CLIPTextConfig:
    """The configuration of a CLIP text encoder, with transformers' names and defaults."""

    vocab_size: int = 49408
    hidden_size: int = 512
    intermediate_size: int = 2048
    num_hidden_layers: int = 12
    num_attention_heads: int = 8
    max_position_embeddings: int = 77
    hidden_act: str = "quick_gelu"
    layer_norm_eps: float = 1e-5
    projection_dim: int = 512
    eos_token_id: int = 49407

    @classmethod
    def from_json(cls, config: dict[str, Any]) -> CLIPTextConfig:
        """Reads a transformers `text_encoder/config.json`. Raises ValueError for a value that is not implemented."""
        known = {name: config[name] for name in cls.__dataclass_fields__ if name in config}
        for name in ("projection_dim", "eos_token_id"):
            if not isinstance(known.get(name, 0), int):
                raise ValueError(f"{name} is {known[name]!r:.80}; one integer is implemented")
        parsed = cls(**known)
        check_layers(parsed)
        return parsed


class CLIPTextOutput(NamedTuple):
    """The outputs of a CLIP text encoder, in the model's compute dtype.

    Attributes:
      penultimate: [batch, tokens, hidden_size], states before the last layer, without the final norm.
      last: [batch, tokens, hidden_size], states after the last layer and the final norm.
      pooled: [batch, projection_dim], projection of `last` at the end token.
    """

    penultimate: Float[Array, "batch tokens features"]
    last: Float[Array, "batch tokens features"]
    pooled: Float[Array, "batch projection"]


class CLIPBlock(nnx.Module):
    """One layer: pre-norm attention and MLP on a residual stream in fp32. For text, attention is causal."""

    def __init__(
        self, config: LayerConfig, *, causal: bool = True, dtype: DTypeLike, param_dtype: DTypeLike, rngs: nnx.Rngs
    ):
        width, heads = config.hidden_size, config.num_attention_heads
        dtypes = {"dtype": dtype, "param_dtype": param_dtype, "rngs": rngs}
        self.attention_norm = layer_norm(config, param_dtype, rngs)
        self.attention = SelfAttention(width, heads, width // heads, use_bias=True, **dtypes)
        self.mlp_norm = layer_norm(config, param_dtype, rngs)
        self.up = nnx.Linear(width, config.intermediate_size, **dtypes)
        self.down = nnx.Linear(config.intermediate_size, width, preferred_element_type=jnp.float32, **dtypes)
        self.activation = ACTIVATIONS[config.hidden_act]
        self.causal = causal

    def __call__(self, x: Float[Array, "batch tokens width"]) -> Float[Array, "batch tokens width"]:
        x = x + self.attention(self.attention_norm(x), causal=self.causal)
        return x + self.mlp(x)

    def mlp(self, x: Float[Array, "batch tokens width"]) -> Float[Array, "batch tokens width"]:
        """Returns what the MLP adds to the stream, its norm included."""
        return split_batch(self.down(self.activation(self.up(split_batch(self.mlp_norm(x))))))


def layer_norm(config: LayerConfig, param_dtype: DTypeLike, rngs: nnx.Rngs) -> nnx.LayerNorm:
    """Makes a layer norm in fp32.

    The variance is the mean squared distance from the mean: the mean of squares minus the squared mean loses digits.
    """
    return nnx.LayerNorm(
        config.hidden_size,
        epsilon=config.layer_norm_eps,
        dtype=jnp.float32,
        param_dtype=param_dtype,
        use_fast_variance=False,
        rngs=rngs,
    )


class CLIPText(nnx.Module):
    """CLIP's text encoder: returns states of every token, and one projected state of the whole text.

    Attention is causal.
    """

    def __init__(
        self,
        config: CLIPTextConfig,
        *,
        dtype: DTypeLike = jnp.float32,
        param_dtype: DTypeLike = jnp.float32,
        rngs: nnx.Rngs,
    ):
        width = config.hidden_size
        dtypes: dict[str, Any] = {"dtype": dtype, "param_dtype": param_dtype}
        self.config = config
        self.dtype = dtype
        self.token_embedding = nnx.Embed(config.vocab_size, width, param_dtype=param_dtype, rngs=rngs)
        self.position_embedding = nnx.Embed(config.max_position_embeddings, width, param_dtype=param_dtype, rngs=rngs)
        self.blocks = stack_layers(lambda rngs: CLIPBlock(config, **dtypes, rngs=rngs), config.num_hidden_layers, rngs)
        self.final_norm = layer_norm(config, param_dtype, rngs)
        self.projection = nnx.Linear(width, config.projection_dim, use_bias=False, **dtypes, rngs=rngs)

    @property
    def layer_stacks(self) -> tuple[LayerStack, ...]:
        return (LayerStack("blocks", "blocks", 0, self.config.num_hidden_layers),)

    def __call__(self, ids: Int[Array, "batch tokens"]) -> CLIPTextOutput:
        """Encodes token ids. Pad tokens are not masked; a token attends to itself and all tokens before it.

        Raises ValueError if there are more tokens than positions.
        """
        x = self.embed(ids)
        # The carry also holds the state one layer back, so that the penultimate state costs no second scan and no copy.
        (x, penultimate), _ = scan_layers(
            lambda states, block: ((block(states[0]), states[0]), None), (x, x), self.blocks
        )
        last = self.final_norm(x)
        end = self.end_position(ids)
        pooled = self.projection(split_batch(jnp.take_along_axis(last, end[:, None, None], axis=1)[:, 0]))
        return CLIPTextOutput(penultimate.astype(self.dtype), last.astype(self.dtype), pooled)

    def embed(self, ids: Int[Array, "batch tokens"]) -> Float[Array, "batch tokens width"]:
        """Returns the embeddings of tokens and positions, fp32. Raises ValueError if there are too many tokens."""
        tokens, most = ids.shape[1], self.config.max_position_embeddings
        if tokens > most:
            raise ValueError(f"ids have {tokens} tokens; this CLIP has positions for {most}: split or shorten the text")
        states = jnp.take(self.token_embedding.embedding[...], ids, axis=0).astype(jnp.float32)
        return states + self.position_embedding.embedding[:tokens]

    def end_position(self, ids: Int[Array, "batch tokens"]) -> Int[Array, " batch"]:
        """Returns the position of each text's first end token; 0 if there is none."""
        if self.config.eos_token_id == LEGACY_EOS:
            return ids.argmax(axis=-1)
        return (ids == self.config.eos_token_id).argmax(axis=-1)
