"""The text conditioning of the transformer: a context of token states, and one pooled vector for each prompt."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import jax
from jaxtyping import Array, Float

from seg4diff_jax.models.kernels import repeat_last


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class TextConditioning:
    """A pytree of token states (CLIP's, then T5's or the zeros in their place) and of pooled states.

    The transformer adds no positions to text, so tokens with equal states stay equal in every block. The last token
    may therefore stand for several equal ones. It is computed once, and attention counts it that many times. Attention
    records show every token.

    Attributes:
      context: states of the tokens that are computed.
      pooled: pooled states of the CLIP encoders, concatenated.
      last_token_count: how many equal tokens the last one stands for, such as the zeros of an absent T5. Static.
      segments: name and length of each part of the text, in order, such as `(("clip", 77), ("t5", 77))`. Lengths count
        all equal tokens. Attention requests use these names. Empty: the parts have no names. Static.

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
        """Makes a conditioning from a context that holds every token, of which the last `equal` are equal.

        Raises ValueError if `equal` is below 1 or the context has fewer tokens.
        """
        if not 1 <= equal <= context.shape[-2]:
            raise ValueError(f"equal is {equal}; expected 1 to the context's {context.shape[-2]} tokens")
        return cls(context[..., : context.shape[-2] - equal + 1, :], pooled, equal, segments)

    def tokens(self, name: str) -> tuple[int, int]:
        """Returns the first and last (exclusive) token of a segment. Raises ValueError if no segment has the name."""
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
        """The states of every token, with equal tokens repeated, as other frameworks hold them."""
        return repeat_last(self.context, self.last_token_count, axis=self.context.ndim - 2)
