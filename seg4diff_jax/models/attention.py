"""Joint attention of image and text tokens, which returns its probabilities as well as its output.

Image tokens come first in the joint sequence, text tokens after them; one softmax runs over all keys (Seg4Diff,
section 3). A captured map needs only one number per query beside q and k: the softmax's log-normaliser. The kernels in
`seg4diff_jax.models.kernels` return it exactly, in fp32, so no map ever costs an array of tokens x tokens elements.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any, Literal, get_args

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from seg4diff_jax.models.conditioning import TextConditioning
from seg4diff_jax.models.kernels import Kernel, attend, attention_scores, log_normalizer, repeat_last

Quadrant = Literal["image_to_text", "text_to_image", "image_to_image", "text_to_text"]


@dataclass(frozen=True)
class AttentionRequest:
    """What a captured block returns. Static under jit.

    Attributes:
      quadrants: which parts of the joint attention matrix.
      scores: return q.k / sqrt(head_dim), before the softmax.
      probs: return the softmax over all keys, image and text.
      mean_heads: average maps over heads; otherwise heads are kept.
      qkv: return the joint sequence's queries, keys and values.
      text_tokens: which text tokens every map shows: a segment of the conditioning by its name, `clip` or `t5`, or
        the first and the last (exclusive; None: to the end), cut where the text ends.
    """

    quadrants: tuple[Quadrant, ...] = ("image_to_text",)
    scores: bool = True
    probs: bool = True
    mean_heads: bool = False
    qkv: bool = False
    text_tokens: str | tuple[int, int | None] = "clip"

    def __post_init__(self):
        quadrants = (self.quadrants,) if isinstance(self.quadrants, str) else tuple(self.quadrants)
        object.__setattr__(self, "quadrants", quadrants)
        unknown = [name for name in self.quadrants if name not in get_args(Quadrant)]
        if unknown:
            raise ValueError(f"no quadrant is called {unknown[0]!r}; there are {', '.join(get_args(Quadrant))}")
        if isinstance(self.text_tokens, str):
            return
        start, stop = self.text_tokens
        if start < 0 or (stop is not None and stop <= start):
            raise ValueError(f"text_tokens is {self.text_tokens}; expected 0 <= first < last, or None for the end")


IMAGE_TO_TEXT = AttentionRequest()
"""The default: image-to-text scores and probabilities of CLIP's tokens, heads kept."""


@dataclass(frozen=True)
class ForwardOptions:
    """How blocks are computed, and what those that are captured return. Static under jit.

    Attributes:
      request: what each record holds; None: no block is recorded.
      kernel: attention kernel; None: by backend and dtype (`default_kernel`).
      remat: recompute each block in the backward pass; True, or a `jax.checkpoint` policy.
    """

    request: AttentionRequest | None = IMAGE_TO_TEXT
    kernel: Kernel | None = None
    remat: bool | Callable = False

    def about(self, conditioning: TextConditioning) -> ForwardOptions:
        """With a requested segment as the numbers of its tokens. Raises ValueError when the text has none such."""
        if self.request is None or not isinstance(self.request.text_tokens, str):
            return self
        tokens = conditioning.tokens(self.request.text_tokens)
        return replace(self, request=replace(self.request, text_tokens=tokens))


DEFAULT_OPTIONS, UNRECORDED = ForwardOptions(), ForwardOptions(request=None)


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class AttentionMap:
    """One quadrant of a block's joint attention, fp32 [batch, heads, queries, keys], or without heads if averaged."""

    scores: Float[Array, "*shape"] | Any | None  # JAX rebuilds pytrees with stand-ins for arrays
    probs: Float[Array, "*shape"] | Any | None


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class JointAttention:
    """What one block's joint attention looked like: a pytree; parts that were not requested are None.

    `scores` and `probs` are the image-to-text ones, [batch, heads, image tokens, text tokens] (no heads if averaged).
    """

    image_to_text: AttentionMap | None = None
    text_to_image: AttentionMap | None = None
    image_to_image: AttentionMap | None = None
    text_to_text: AttentionMap | None = None
    q: Float[Array, "*shape"] | Any | None = None
    k: Float[Array, "*shape"] | Any | None = None
    v: Float[Array, "*shape"] | Any | None = None

    @property
    def scores(self) -> Float[Array, "*shape"] | Any | None:
        return self.image_to_text and self.image_to_text.scores

    @property
    def probs(self) -> Float[Array, "*shape"] | Any | None:
        return self.image_to_text and self.image_to_text.probs


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class QKV:
    """Queries, keys and values of one stream, or of the joint sequence; the last token stands for `last_count`."""

    q: Float[Array, "batch queries heads head_dim"] | Any  # JAX rebuilds pytrees with stand-ins for arrays
    k: Float[Array, "batch keys heads head_dim"] | Any
    v: Float[Array, "batch keys heads head_dim"] | Any
    last_count: int = field(default=1, metadata={"static": True})


def join(image: QKV, text: QKV) -> QKV:
    q, k, v = (jnp.concatenate(pair, axis=1) for pair in ((image.q, text.q), (image.k, text.k), (image.v, text.v)))
    return QKV(q, k, v, text.last_count)


def joint_attention(
    image: QKV, text: QKV, options: ForwardOptions = UNRECORDED
) -> tuple[
    Float[Array, "batch image heads head_dim"], Float[Array, "batch text heads head_dim"], JointAttention | None
]:
    """Attention over both streams' tokens: the output of each stream, and the record if one is requested."""
    joint, request = join(image, text), options.request
    image_tokens = image.q.shape[1]
    output, normalizer = attend(
        joint.q,
        joint.k,
        joint.v,
        kernel=options.kernel,
        normalizer=request is not None and request.probs,
        last_key_count=joint.last_count,
    )
    record = None if request is None else _record(joint, image_tokens, normalizer, request)
    return output[:, :image_tokens], output[:, image_tokens:], record


def attention_record(image: QKV, text: QKV, options: ForwardOptions = DEFAULT_OPTIONS) -> JointAttention:
    """The record alone: nothing after q and k is computed (values are returned if requested, but not used).

    Raises ValueError when the options request none.
    """
    joint, request = join(image, text), options.request
    if request is None:
        raise ValueError("no record is requested: expected options with a request")
    image_tokens = image.q.shape[1]
    normalizer = None
    if request.probs:
        only_image_rows = not any(quadrant.startswith("text") for quadrant in request.quadrants)
        queries = image.q if only_image_rows else joint.q
        normalizer = log_normalizer(queries, joint.k, kernel=options.kernel, last_key_count=joint.last_count)
    return _record(joint, image_tokens, normalizer, request)


def _record(
    joint: QKV,
    image_tokens: int,
    normalizer: Float[Array, "batch heads queries"] | None,
    request: AttentionRequest,
) -> JointAttention:
    """Shows every token: of the last as many as it stands for."""
    count = joint.last_count
    joint = jax.tree.map(lambda x: repeat_last(x, count, axis=1), joint)
    if normalizer is not None and normalizer.shape[2] > image_tokens:
        normalizer = repeat_last(normalizer, count, axis=2)
    if isinstance(request.text_tokens, str):
        raise ValueError(f"text_tokens is {request.text_tokens!r}; without a conditioning expected first and last")
    start, stop = request.text_tokens
    stop = joint.k.shape[1] if stop is None else min(image_tokens + stop, joint.k.shape[1])
    if image_tokens + start >= stop:
        raise ValueError(
            f"text_tokens is {request.text_tokens}; this text has {joint.k.shape[1] - image_tokens} tokens"
        )
    tokens = {"image": slice(0, image_tokens), "text": slice(image_tokens + start, stop)}
    parts: dict[str, Any] = {}
    for quadrant in request.quadrants:
        queries, keys = (tokens[stream] for stream in quadrant.split("_to_"))
        scores = attention_scores(joint.q[:, queries], joint.k[:, keys])
        probs = jnp.exp(scores - normalizer[:, :, queries, None]) if normalizer is not None else None
        if request.mean_heads:
            scores, probs = (None if array is None else array.mean(axis=1) for array in (scores, probs))
        parts[quadrant] = AttentionMap(scores=scores if request.scores else None, probs=probs)
    if request.qkv:
        parts |= {"q": joint.q, "k": joint.k, "v": joint.v}
    return JointAttention(**parts)
