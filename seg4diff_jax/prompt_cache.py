"""Keeps the conditioning of prompts, so that one that is used again is not encoded again."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from seg4diff_jax.models.conditioning import TextConditioning
from seg4diff_jax.passes import each_prompt, stacked_prompts

REMEMBERED = 256
"""Prompts whose encoding is kept: about 2.5 MB each at SD3's sizes in fp32."""


@dataclass
class PromptCache:
    """The conditioning of the `REMEMBERED` prompts used last, in the order of use."""

    kept: dict[str, TextConditioning] = field(default_factory=dict)

    def conditioning(
        self, prompts: Sequence[str], encode: Callable[[list[str]], TextConditioning], rows: int | None = None
    ) -> TextConditioning:
        """Returns a batch of conditionings, one for each prompt; `encode` is called for those that are new.

        Args:
          rows: how many are encoded at a time, at least as many as are new, so that one program serves. Default: what
            is new, filled up to a power of two.
        """
        new = [prompt for prompt in dict.fromkeys(prompts) if prompt not in self.kept]
        if new:
            filled = new + new[:1] * ((rows or 2 ** (len(new) - 1).bit_length()) - len(new))
            self.kept |= zip(new, each_prompt(encode(filled)), strict=False)
        stacked = stacked_prompts([self.kept[prompt] for prompt in prompts])
        for prompt in prompts:
            self.kept[prompt] = self.kept.pop(prompt)
        for prompt in list(self.kept)[:-REMEMBERED]:
            del self.kept[prompt]
        return stacked
