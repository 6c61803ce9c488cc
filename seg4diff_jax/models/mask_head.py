"""The small convolutional head that Seg4Diff's release applies to attention maps in training.

The paper does not have it. Checkpoints of the release call its layers `attn_mlp.attn_score_layer.{0,2,4}`.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax.typing import DTypeLike
from jaxtyping import Array, Float, PRNGKeyArray

from seg4diff_jax.models.stacked_layers import LayerStack

WIDTH = 64


class MaskHead(nnx.Module):
    """Refines maps: adds the output of three 3 x 3 convolutions (1-64-64-1 channels, ReLU between them) to each map.

    Parameters are initialised as PyTorch's convolutions are: uniform within 1 / sqrt(inputs of one output).

    Args:
      dtype: dtype of the computation.
      param_dtype: dtype of the parameters at initialisation.
    """

    def __init__(self, *, dtype: DTypeLike = jnp.float32, param_dtype: DTypeLike = jnp.float32, rngs: nnx.Rngs):
        options: dict[str, Any] = {"dtype": dtype, "param_dtype": param_dtype, "rngs": rngs}
        sides = ((1, WIDTH), (WIDTH, WIDTH), (WIDTH, 1))
        initial = lambda before: dict.fromkeys(("kernel_init", "bias_init"), partial(_within, (9 * before) ** -0.5))
        self.layers = nnx.List(
            [nnx.Conv(before, after, (3, 3), **initial(before), **options) for before, after in sides]
        )

    @property
    def layer_stacks(self) -> tuple[LayerStack, ...]:
        return ()

    def __call__(self, maps: Float[Array, "*batch rows columns"]) -> Float[Array, "*batch rows columns"]:
        """Returns refined maps, in the dtype of `maps`."""
        first, *rest = self.layers
        hidden = first(maps[..., None])
        for layer in rest:
            hidden = layer(jax.nn.relu(hidden))
        return maps + hidden[..., 0].astype(maps.dtype)


def _within(limit: float, key: PRNGKeyArray, shape: Any, dtype: Any, *_: Any) -> Array:
    return jax.random.uniform(key, shape, dtype, -limit, limit)
