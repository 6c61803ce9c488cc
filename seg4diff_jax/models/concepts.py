"""Concept tokens: text tokens that read the image and their own prompt, and that nothing reads (ConceptAttention).

Helbling et al., arXiv 2502.04320. They pass through the text stream's layers beside the text, so that their states are
those of a text of the same words; the image and other concepts are as if they were not there. Each prompt of concepts
is a group of its own. Where a group is the text itself, its states and its maps are the text's.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from seg4diff_jax.models.attention import QKV
from seg4diff_jax.models.kernels import Kernel, attend, attention_scores, log_normalizer, repeat_last


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Concepts:
    """A pytree of groups of concept tokens: the same number of groups for each image, an image's after one another.

    Attributes:
      tokens: their states.
      vector: embedding of the timestep and of each group's pooled text, which modulates it in every block.
      last_count: how many equal tokens the last of each group stands for. Static.
    """

    tokens: Float[Array, "groups tokens dim"] | Any  # JAX rebuilds pytrees with stand-ins for arrays
    vector: Float[Array, "groups dim"] | Any
    last_count: int = field(default=1, metadata={"static": True})


def attend_to_image_and_group(
    own: QKV, image: QKV, kernel: Kernel | None = None
) -> Float[Array, "groups tokens heads head_dim"]:
    """Returns the attention of each group's tokens to the image's and to their own, under one softmax.

    Two calls of the kernel, put together by their log-normalisers.

    Args:
      own: of groups, several for each image.
      image: of the images.
    """
    images, each = len(image.q), own.q.shape[1:]
    to_image, image_total = attend(
        own.q.reshape(images, -1, *each[1:]), image.k, image.v, kernel=kernel, normalizer=True
    )
    to_own, own_total = attend(own.q, own.k, own.v, kernel=kernel, normalizer=True, last_key_count=own.last_count)
    assert image_total is not None
    assert own_total is not None
    heads_last = jnp.moveaxis(image_total, 1, 2).reshape(len(own.q), *each[:2])
    share = jax.nn.sigmoid(heads_last - jnp.moveaxis(own_total, 1, 2))[..., None]
    together = share * to_image.reshape(own.q.shape).astype(jnp.float32) + (1 - share) * to_own
    return together.astype(to_own.dtype)


def image_to_concepts(
    own: QKV, image: QKV, tokens: tuple[int, int], kernel: Kernel | None = None
) -> Float[Array, "groups heads image_tokens concept_tokens"]:
    """Returns the probabilities with which image tokens would attend to a group, if it were the text.

    Args:
      own: of groups, several for each image.
      image: of the images.
      tokens: the first and last (exclusive) token of each group that is shown.
    """
    groups, shown = len(own.q) // len(image.q), slice(*tokens)
    every = lambda array: jnp.repeat(array, groups, axis=0)
    to_image = every(log_normalizer(image.q, image.k, kernel=kernel))
    to_own = log_normalizer(every(image.q), own.k, kernel=kernel, last_key_count=own.last_count)
    keys = repeat_last(own.k, own.last_count, axis=1)[:, shown]
    return jnp.exp(attention_scores(every(image.q), keys) - jnp.logaddexp(to_image, to_own)[..., None])


def output_likeness(
    image: Float[Array, "images image_tokens heads head_dim"],
    own: Float[Array, "groups concept_tokens heads head_dim"],
    averaging: Float[Array, "groups classes concept_tokens"],
    head: int | None = None,
) -> Float[Array, "groups classes image_tokens"]:
    """Returns how alike the attention outputs of image tokens are to those of each class's concept tokens.

    The dot product over all heads, or within one, with the mean of a class's tokens (ConceptAttention, section 4).

    Args:
      averaging: weights of each class's tokens in each group.
    """
    chosen = slice(None) if head is None else slice(head, head + 1)
    groups, image = len(own) // len(image), image[:, :, chosen]
    of_classes = jnp.einsum("gthd,gct->gchd", own[:, :, chosen], averaging, precision="highest")
    of_classes = of_classes.reshape(len(image), groups, *of_classes.shape[1:])
    found = jnp.einsum("bnhd,bgchd->bgcn", image, of_classes, precision="highest", preferred_element_type=jnp.float32)
    return found.reshape(len(own), *found.shape[2:])
