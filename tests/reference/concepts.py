"""Concept tokens in diffusers' SD3: text tokens behind the text's own, and a mask over the whole attention matrix."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from diffusers import SD3Transformer2DModel

from tests.reference.attention import ExplicitSoftmax


@dataclass
class GroupsThatOnlyRead(ExplicitSoftmax):
    """Joint attention in which the tokens of each group read the image and their own group, and nothing reads them.

    Attributes:
      text: how many text tokens are no group's.
      group: how many tokens each group has.
    """

    text: int
    group: int

    def mixing(self, image_tokens: int) -> torch.Tensor:
        self.image_tokens = image_tokens
        places = torch.arange(self.scores.shape[-1])
        owner = torch.where(places < image_tokens, -2, (places - image_tokens - self.text) // self.group)
        owner = torch.where((places >= image_tokens) & (places < image_tokens + self.text), -1, owner)
        queries, keys = owner[:, None], owner[None, :]
        reads = torch.where(queries < 0, keys < 0, (keys == -2) | (keys == queries))
        return self.scores.masked_fill(~reads, -torch.inf).softmax(-1)

    def image_to_group(self, number: int) -> torch.Tensor:
        """Probabilities of the image's queries over the image's keys and the group's, those of the group."""
        first = self.image_tokens + self.text + number * self.group
        scores = self.scores[:, :, : self.image_tokens]
        both = torch.cat([scores[..., : self.image_tokens], scores[..., first : first + self.group]], -1)
        return both.softmax(-1)[..., self.image_tokens :]


def with_groups(model: SD3Transformer2DModel, text: int, group: int) -> list[GroupsThatOnlyRead]:
    """Puts such attention into every block; returns the processors, which keep what they computed."""
    processors = []
    for block in model.transformer_blocks:
        block.attn.set_processor(GroupsThatOnlyRead(text, group))
        processors.append(block.attn.processor)
    return processors
