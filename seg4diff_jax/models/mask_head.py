"""The small convolutional head that Seg4Diff's release puts on attention maps in training. The paper does not have it.

In checkpoints of the release: `attn_mlp.attn_score_layer.{0,2,4}`.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax.typing import DTypeLike
from jaxtyping import Array, Float

from seg4diff_jax.models.stack import LayerStack

WIDTH = 64


class MaskHead(nnx.Module):
    """A map plus what three 3 x 3 convolutions (1-64-64-1 channels, ReLU between them) make of it.

    Args:
      dtype: of the computation.
      param_dtype: of the parameters at initialisation.
    """

    def __init__(self, *, dtype: DTypeLike = jnp.float32, param_dtype: DTypeLike = jnp.float32, rngs: nnx.Rngs):
        options: dict[str, Any] = {"dtype": dtype, "param_dtype": param_dtype, "rngs": rngs}
        sides = ((1, WIDTH), (WIDTH, WIDTH), (WIDTH, 1))
        self.layers = nnx.List([nnx.Conv(before, after, (3, 3), **options) for before, after in sides])

    @property
    def layer_stacks(self) -> tuple[LayerStack, ...]:
        return ()

    def __call__(self, maps: Float[Array, "*batch rows columns"]) -> Float[Array, "*batch rows columns"]:
        """Refined maps, in the maps' dtype."""
        first, *rest = self.layers
        hidden = first(maps[..., None])
        for layer in rest:
            hidden = layer(jax.nn.relu(hidden))
        return maps + hidden[..., 0].astype(maps.dtype)
