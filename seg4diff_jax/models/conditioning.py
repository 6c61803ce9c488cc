"""What the transformer reads of prompts: a context of token states, and one pooled vector."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import jax
from jaxtyping import Array, Float

from seg4diff_jax.models.kernels import repeat_last


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class TextConditioning:
    """Token states, the CLIP ones first, then T5's or the zeros in their place; and pooled states. A pytree.

    Text carries no positions, so tokens with equal states stay equal in every block. The last token may stand for
    several: it is computed once and attended to as often as it counts. Attention records show every token.

    Attributes:
      context: states of the tokens that are computed.
      pooled: pooled states of the CLIP encoders, side by side.
      last_token_count: how many equal tokens the last one stands for, such as the zeros of an absent T5. Static.
      segments: name and length of each part of the text, in order, such as `(("clip", 77), ("t5", 77))`; equal tokens
        count. Attention is asked for by these names. Empty: nothing is said. Static.

    Raises:
      ValueError: `last_token_count` is no positive whole number.
    """

    context: Float[Array, "*batch tokens width"] | Any  # JAX rebuilds pytrees with stand-ins for arrays
    pooled: Float[Array, "*batch pooled_width"] | Any
    last_token_count: int = field(default=1, metadata={"static": True})
    segments: tuple[tuple[str, int], ...] = field(default=(), metadata={"static": True})

    def __post_init__(self):
        if type(self.last_token_count) is not int or self.last_token_count < 1:
            raise ValueError(f"last_token_count is {self.last_token_count!r}; expected a whole number, at least 1")

    @classmethod
    def from_full(
        cls,
        context: Float[Array, "*batch all_tokens width"],
        pooled: Float[Array, "*batch pooled_width"],
        equal: int,
        segments: tuple[tuple[str, int], ...] = (),
    ) -> TextConditioning:
        """Of a context that shows every token, the last `equal` of which are equal.

        Raises ValueError when the context has fewer.
        """
        if not 1 <= equal <= context.shape[-2]:
            raise ValueError(f"equal is {equal}; expected 1 to the context's {context.shape[-2]} tokens")
        return cls(context[..., : context.shape[-2] - equal + 1, :], pooled, equal, segments)

    def tokens(self, name: str) -> tuple[int, int]:
        """First and last (exclusive) token of a segment. Raises ValueError when there is none of that name."""
        start = 0
        for segment, length in self.segments:
            if segment == name:
                return start, start + length
            start += length
        there = f"there are {', '.join(name for name, _ in self.segments)}" if self.segments else "it names none"
        raise ValueError(
            f"the text has no segment called {name!r}: {there}; name one, or give the first and the last token"
        )

    @property
    def full_context(self) -> Float[Array, "*batch all_tokens width"]:
        """States of every token, equal ones repeated, as other frameworks have them."""
        return repeat_last(self.context, self.last_token_count, axis=self.context.ndim - 2)
