"""Sorts a prompt's tokens into groups: start, prompt, end and padding of CLIP's tokens, and the same of T5's.

The paper's shares and norms are of "text tokens" and of "prompt tokens without padding" (Seg4Diff, section 3 and
figure 4). Whether its prompt tokens include the start and the end token is not said; here each is a group of its own.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import jax
import numpy as np
from jaxtyping import Array, Float

from seg4diff_jax.models.conditioning import TextConditioning
from seg4diff_jax.prompt_attention import word_tokens
from seg4diff_jax.text import Tokenizers

IMAGE = "image"


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class TokenGroups:
    """Which tokens of each prompt are in which group. A pytree.

    Attributes:
      members: how many tokens of a group a text token of the conditioning stands for: 0 or 1, of the last token up to
        its count. A group may be empty, such as the padding of a long prompt.
      names: of the groups of text tokens, in order. Static.
    """

    members: Float[Array | np.ndarray, "prompts groups tokens"] | Any  # JAX rebuilds pytrees with stand-ins for arrays
    names: tuple[str, ...] = field(metadata={"static": True})

    @property
    def all_names(self) -> tuple[str, ...]:
        """The groups of all tokens: the image's, then the text's."""
        return (IMAGE, *self.names)

    def sizes(self, image_tokens: int) -> Float[np.ndarray, "prompts all_groups"]:
        """Returns the number of tokens of each group, the image's first."""
        text = np.asarray(self.members).sum(axis=2)
        return np.concatenate([np.full((len(text), 1), image_tokens, text.dtype), text], axis=1)


def token_groups(tokenizers: Tokenizers, prompts: Sequence[str], texts: TextConditioning) -> TokenGroups:
    """Returns the groups of the prompts whose conditioning is `texts`, in order.

    CLIP's two tokenizers give a prompt the same number of tokens, but for one with a '!', which the second pads with;
    the longer of the two counts. Where no T5 is loaded, the zeros in its place are one group, "t5 zeros".

    Raises ValueError if the parts of the text have no names.
    """
    if not texts.segments:
        raise ValueError("the text's parts have no names: expected a conditioning with segments")
    columns: dict[str, list[Float[np.ndarray, " tokens"]]] = {}
    total = sum(length for _, length in texts.segments)
    for prompt in prompts:
        start = 0
        for segment, length in texts.segments:
            for name, places in _of_segment(tokenizers, prompt, segment, length).items():
                member = np.zeros(total, np.float32)
                member[start + places.start : start + places.stop] = 1
                columns.setdefault(name, []).append(member)
            start += length
    members = np.stack([np.stack(of_prompts) for of_prompts in columns.values()], axis=1)
    own = total - texts.last_token_count
    counted = np.concatenate([members[..., :own], members[..., own:].sum(axis=-1, keepdims=True)], axis=-1)
    return TokenGroups(counted, tuple(columns))


def _of_segment(tokenizers: Tokenizers, prompt: str, segment: str, length: int) -> dict[str, range]:
    read = [word_tokens(tokenizer, prompt, length)[1] for tokenizer in tokenizers.of(segment)]
    if not read:
        return {f"{segment} zeros": range(length)}
    end = max(read) - 1
    first = 1 if segment == "clip" else 0  # T5 has no start token
    starts = {f"{segment} start": range(first)} if first else {}
    return starts | {
        f"{segment} prompt": range(first, end),
        f"{segment} end": range(end, end + 1),
        f"{segment} padding": range(end + 1, length),
    }
