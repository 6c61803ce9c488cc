"""Measures by CLIP how well pictures show their prompts: cosine similarities, CLIPScore and rank accuracy."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from seg4diff_jax.models.clip import CLIPText
from seg4diff_jax.models.clip_vision import CLIPVision


def unit_vectors(x: Float[Array, "batch features"]) -> Float[Array, "batch features"]:
    """Scales rows to length 1; fp32."""
    x = x.astype(jnp.float32)
    return x * jax.lax.rsqrt(jnp.square(x).sum(axis=-1, keepdims=True) + 1e-12)


@jax.jit
def picture_vectors(
    vision: CLIPVision, pixels: Float[Array, "pictures size size channels"]
) -> Float[Array, "pictures projection"]:
    """Returns the unit vectors of pictures. Pixels are normalised as in the encoder's training."""
    return unit_vectors(vision(pixels))


@jax.jit
def prompt_vectors(text: CLIPText, ids: Int[Array, "prompts tokens"]) -> Float[Array, "prompts projection"]:
    """Returns the unit vectors of prompts, in the same space as those of pictures."""
    return unit_vectors(text(ids).pooled)


@jax.jit
def cosine_similarities(
    pictures: Float[Array, "pictures projection"], prompts: Float[Array, "prompts projection"]
) -> Float[Array, "pictures prompts"]:
    """Returns the cosine similarity of every picture with every prompt, -1 to 1, from unit vectors."""
    return jnp.matmul(pictures, prompts.T, precision="highest")


def clip_scores(similarities: Float[Array, "pictures pictures"]) -> Float[Array, " pictures"]:
    """Returns the CLIPScore of each picture with its own prompt: 100 x cosine, and at least 0.

    This is the CLIPScore of torchmetrics, max(100 cosine, 0). That of Hessel et al. (EMNLP 2021), 2.5 max(cosine, 0),
    is a fortieth of it. Prompt i is picture i's own.
    """
    return 100 * jnp.maximum(jnp.diagonal(similarities), 0)


def rank_accuracy(similarities: Float[Array, "pictures pictures"], choices: int = 16) -> Float[Array, ""]:
    """Returns how often a picture ranks its own prompt first among `choices` prompts: its own and others at random.

    This is no estimate, but the exact mean over every way to draw the others, with ties broken at random. Pictures that
    have nothing to do with their prompts score 1 / choices.

    Args:
      similarities: of picture i with prompt j; prompt i is picture i's own.

    Raises:
      ValueError: there are fewer prompts than choices, or choices is not at least 1.
    """
    count = len(similarities)
    if not 1 <= choices <= count:
        raise ValueError(f"choices is {choices}; expected 1 to the number of prompts, {count}")
    own = jnp.diagonal(similarities)[:, None]
    better = (similarities > own).sum(axis=1)
    equal = (similarities == own).sum(axis=1)  # itself included
    # With r better prompts among the rest, the own prompt is first if none of them is drawn. The probability of that
    # is C(rest - r, drawn) / C(rest, drawn), here as a running product over r.
    rest, drawn = count - 1, choices - 1
    ahead = jnp.arange(rest)
    none_drawn = jnp.cumprod(jnp.maximum(rest - drawn - ahead, 0) / jnp.maximum(rest - ahead, 1))
    totals = jnp.concatenate([jnp.zeros(1), jnp.cumsum(jnp.concatenate([jnp.ones(1), none_drawn]))])
    # Ties are in random order: `better` to `better + equal - 1` prompts are ahead, each number equally likely.
    return ((totals[better + equal] - totals[better]) / equal).mean()
