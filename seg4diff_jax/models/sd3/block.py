"""One MM-DiT block: two streams, image and text, each with its own weights, that meet in joint attention."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from seg4diff_jax.models.attention import QKV, UNRECORDED, ForwardOptions, JointQKV, joint_attention
from seg4diff_jax.models.concepts import Concepts, attend_to_image_and_group
from seg4diff_jax.models.kernels import attend
from seg4diff_jax.models.sd3.config import MMDiTConfig
from seg4diff_jax.parallel import split_batch

MODULATIONS = {"joint": 6, "dual": 9, "keys only": 2}


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class StreamState:
    """A pytree of the token states of both streams, as one block passes them to the next.

    The last text token stands for `last_token_count` equal ones in every block (see `TextConditioning`).
    Concepts read both streams and change neither.
    """

    image: Float[Array, "batch image dim"] | Any  # JAX rebuilds pytrees with stand-ins for arrays
    text: Float[Array, "batch text dim"] | Any
    last_token_count: int = field(default=1, metadata={"static": True})
    concepts: Concepts | Any = None


def layer_norm(x: Float[Array, "*batch features"]) -> Float[Array, "*batch features"]:
    """Applies a layer norm without parameters, with epsilon 1e-6. Statistics and result are fp32."""
    x = x.astype(jnp.float32)
    centred = x - x.mean(axis=-1, keepdims=True)
    return centred * jax.lax.rsqrt(jnp.square(centred).mean(axis=-1, keepdims=True) + 1e-6)


def modulate(
    x: Float[Array, "batch tokens dim"], shift: Float[Array, "batch dim"], scale: Float[Array, "batch dim"]
) -> Float[Array, "batch tokens dim"]:
    """Applies a layer norm, then a shift and scale that depend on the timestep and the pooled text (adaLN)."""
    modulated = layer_norm(x) * (1 + scale[:, None].astype(jnp.float32)) + shift[:, None]
    return split_batch(modulated.astype(x.dtype))


class MLP(nnx.Module):
    """A linear layer, an activation and a linear layer."""

    def __init__(self, sizes: tuple[int, int, int], activation: Callable, *, rngs: nnx.Rngs, **dtypes: Any):
        self.up = nnx.Linear(sizes[0], sizes[1], rngs=rngs, **dtypes)
        self.down = nnx.Linear(sizes[1], sizes[2], rngs=rngs, **dtypes)
        self.activation = activation

    def __call__(self, x: Float[Array, "*batch features"]) -> Float[Array, "*batch out"]:
        return split_batch(self.down(self.activation(self.up(x))))


def gelu(x: Array) -> Array:
    """Applies the tanh approximation of GELU."""
    return jax.nn.gelu(x, approximate=True)


class Projections(nnx.Module):
    """The projections of one stream for one attention: to queries, keys and values, and from the heads back."""

    def __init__(self, config: MMDiTConfig, *, output: bool = True, rngs: nnx.Rngs, **dtypes: Any):
        width = config.width
        self.q, self.k, self.v = (nnx.Linear(width, width, rngs=rngs, **dtypes) for _ in range(3))
        self.out = nnx.Linear(width, width, rngs=rngs, **dtypes) if output else None
        norms = (nnx.RMSNorm(config.attention_head_dim, epsilon=1e-6, rngs=rngs, **dtypes) for _ in range(2))
        self.q_norm, self.k_norm = norms if config.qk_norm else (None, None)
        self.heads = config.num_attention_heads

    def qkv(self, x: Float[Array, "batch tokens dim"], last_count: int = 1) -> QKV:
        q, k, v = (proj(x).reshape(*x.shape[:2], self.heads, -1) for proj in (self.q, self.k, self.v))
        if self.q_norm is not None and self.k_norm is not None:
            q, k = self.q_norm(q), self.k_norm(k)
        return QKV(q, k, v, last_count)

    def merge(self, heads: Float[Array, "batch tokens heads head_dim"]) -> Float[Array, "batch tokens dim"]:
        assert self.out is not None
        return split_batch(self.out(heads.reshape(*heads.shape[:2], -1)))


class Stream(nnx.Module):
    """The layers of one block for one stream: modulation, projections and MLP.

    Text in the last block is not updated ("keys only"). That stream has neither an output projection nor an MLP.
    """

    def __init__(self, config: MMDiTConfig, kind: str, *, rngs: nnx.Rngs, **dtypes: Any):
        width, updated = config.width, kind != "keys only"
        self.modulation = nnx.Linear(width, MODULATIONS[kind] * width, rngs=rngs, **dtypes)
        self.attention = Projections(config, output=updated, rngs=rngs, **dtypes)
        self.dual_attention = Projections(config, rngs=rngs, **dtypes) if kind == "dual" else None
        self.mlp = MLP((width, 4 * width, width), gelu, rngs=rngs, **dtypes) if updated else None

    def modulations(self, vector: Float[Array, "batch dim"]) -> list[Float[Array, "batch dim"]]:
        """Returns shift, scale and gate of the attention, then of the MLP, then of a second attention.

        There are 9 with a second attention, 6 without, and 2 (a shift and a scale) for "keys only".
        """
        modulation = split_batch(self.modulation(split_batch(jax.nn.silu(vector))))
        return jnp.split(modulation, modulation.shape[-1] // vector.shape[-1], axis=-1)

    def update(
        self,
        x: Float[Array, "batch tokens dim"],
        attended: Float[Array, "batch tokens dim"],
        modulations: list[Float[Array, "batch dim"]],
    ) -> Float[Array, "batch tokens dim"]:
        """Adds the gated attention output, then the gated MLP.

        Args:
          attended: gated attention output, with that of a second attention added if there is one.
          modulations: shift, scale and gate of the MLP.
        """
        shift, scale, gate = modulations
        x = x + attended
        assert self.mlp is not None
        return x + gate[:, None] * self.mlp(modulate(x, shift, scale))


class JointBlock(nnx.Module):
    """One MM-DiT block: it modulates each stream, attends over both together, and updates each by its own MLP."""

    def __init__(self, config: MMDiTConfig, *, dual: bool, last: bool, rngs: nnx.Rngs, **dtypes: Any):
        self.image = Stream(config, "dual" if dual else "joint", rngs=rngs, **dtypes)
        self.text = Stream(config, "keys only" if last else "joint", rngs=rngs, **dtypes)

    def qkv(self, state: StreamState, vector: Float[Array, "batch dim"]) -> tuple[QKV, QKV]:
        """Returns the queries, keys and values of both streams: all that the block's attention record needs."""
        return self._qkv(state, self._modulations(vector))

    def _qkv(self, state: StreamState, modulations: tuple[list[Array], list[Array]]) -> tuple[QKV, QKV]:
        (image_shift, image_scale, *_), (text_shift, text_scale, *_) = modulations
        return (
            self.image.attention.qkv(modulate(state.image, image_shift, image_scale)),
            self.text.attention.qkv(modulate(state.text, text_shift, text_scale), state.last_token_count),
        )

    def _modulations(self, vector: Float[Array, "batch dim"]) -> tuple[list[Array], list[Array]]:
        return self.image.modulations(vector), self.text.modulations(vector)

    def __call__(
        self,
        state: StreamState,
        vector: Float[Array, "batch dim"],
        options: ForwardOptions = UNRECORDED,
    ) -> tuple[StreamState, JointQKV]:
        """Returns both streams after this block, and what the options' request reads of its joint attention.

        Args:
          vector: embedding of the timestep and the pooled text, which modulates both streams.
        """
        image_mod, text_mod = modulations = self._modulations(vector)
        image_qkv, text_qkv = self._qkv(state, modulations)
        image_heads, text_heads, joint = joint_attention(image_qkv, text_qkv, options)
        attended = image_mod[2][:, None] * self.image.attention.merge(image_heads)
        if self.image.dual_attention is not None:
            shift, scale, gate = image_mod[6:]
            dual = self.image.dual_attention.qkv(modulate(state.image, shift, scale))
            heads, _ = attend(dual.q, dual.k, dual.v, kernel=options.kernel)
            attended += gate[:, None] * self.image.dual_attention.merge(heads)
        image, text = self.image.update(state.image, attended, image_mod[3:6]), state.text
        if self.text.mlp is not None:
            attended = text_mod[2][:, None] * self.text.attention.merge(text_heads)
            text = self.text.update(text, attended, text_mod[3:6])
        concepts = state.concepts
        if concepts is not None:
            own = self.concepts_qkv(concepts)
            concepts = self._updated_concepts(concepts, attend_to_image_and_group(own, image_qkv, options.kernel))
        return replace(state, image=image, text=text, concepts=concepts), joint

    def concepts_qkv(self, concepts: Concepts) -> QKV:
        """Returns the queries, keys and values of concept tokens: those of a text with their states."""
        shift, scale, *_ = self.text.modulations(concepts.vector)
        return self.text.attention.qkv(modulate(concepts.tokens, shift, scale), concepts.last_count)

    def _updated_concepts(self, concepts: Concepts, heads: Float[Array, "groups tokens heads head_dim"]) -> Concepts:
        if self.text.mlp is None:
            return concepts
        modulations = self.text.modulations(concepts.vector)
        attended = modulations[2][:, None] * self.text.attention.merge(heads)
        return replace(concepts, tokens=self.text.update(concepts.tokens, attended, modulations[3:6]))
