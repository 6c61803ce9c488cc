"""Joint attention of image and text tokens, which returns its probabilities as well as its output.

Image tokens come first in the joint sequence, text tokens after them; one softmax runs over all keys (Seg4Diff,
section 3). A captured map needs only one number per query beside q and k: the softmax's log-normaliser. The kernels in
`seg4diff_jax.models.kernels` return it exactly, in fp32, so no map ever costs an array of tokens x tokens elements.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any, Literal, Protocol, get_args, runtime_checkable

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from seg4diff_jax.models.conditioning import TextConditioning
from seg4diff_jax.models.kernels import Kernel, attend, attention_scores, log_normalizer, repeat_last
from seg4diff_jax.models.perturbation import Blur, Perturbing, PerturbingBlock, perturbed_attend

Stream = Literal["image", "text"]
Quadrant = Literal["image_to_text", "text_to_image", "image_to_image", "text_to_text"]


@jax.tree_util.register_static
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

    @property
    def normalized_queries(self) -> tuple[Stream, ...]:
        queries = {quadrant.split("_to_")[0] for quadrant in self.quadrants} if self.probs else set()
        return tuple(stream for stream in get_args(Stream) if stream in queries)

    def about(self, conditioning: TextConditioning) -> AttentionRequest:
        """With a segment's name as the numbers of its tokens. Raises ValueError when the text has none such."""
        if not isinstance(self.text_tokens, str):
            return self
        return replace(self, text_tokens=conditioning.tokens(self.text_tokens))

    def read(self, joint: JointQKV) -> JointAttention:
        """Shows every token: of the last as many as it stands for."""
        if isinstance(self.text_tokens, str):
            raise ValueError(f"text_tokens is {self.text_tokens!r}; without a conditioning expected first and last")
        joint, image_tokens = joint.with_every_token(), joint.image_tokens
        start, stop = self.text_tokens
        stop = joint.k.shape[1] if stop is None else min(image_tokens + stop, joint.k.shape[1])
        if image_tokens + start >= stop:
            raise ValueError(
                f"text_tokens is {self.text_tokens}; this text has {joint.k.shape[1] - image_tokens} tokens"
            )
        tokens = {"image": slice(0, image_tokens), "text": slice(image_tokens + start, stop)}
        parts: dict[str, Any] = {}
        for quadrant in self.quadrants:
            queries, keys = (tokens[stream] for stream in quadrant.split("_to_"))
            scores = attention_scores(joint.q[:, queries], joint.k[:, keys])
            normalizer = joint.normalizer if self.probs else None
            probs = None if normalizer is None else jnp.exp(scores - normalizer[:, :, queries, None])
            if self.mean_heads:
                scores, probs = (None if array is None else array.mean(axis=1) for array in (scores, probs))
            parts[quadrant] = AttentionMap(scores=scores if self.scores else None, probs=probs)
        if self.qkv:
            parts |= {"q": joint.q, "k": joint.k, "v": joint.v}
        return JointAttention(**parts)


@runtime_checkable
class Reader(Protocol):
    """What is kept of a captured block's attention: maps (`AttentionRequest`), or figures computed of them.

    Attributes:
      normalized_queries: the streams whose queries' log-normalisers are read. Empty: none is.
    """

    @property
    def normalized_queries(self) -> tuple[Stream, ...]: ...

    def about(self, conditioning: TextConditioning) -> Reader:
        """Returns the reader for a text, with what it asks by name found there. Raises ValueError if it is not."""
        ...

    def read(self, joint: JointQKV) -> Any:
        """Returns the block's record: a pytree of arrays."""
        ...


IMAGE_TO_TEXT = AttentionRequest()
"""The default: image-to-text scores and probabilities of CLIP's tokens, heads kept."""


@dataclass(frozen=True)
class ForwardOptions:
    """How blocks are computed, and what those that are captured return. Static under jit.

    Attributes:
      request: what each record holds; None: no block is recorded. A reader that holds arrays is for use inside jit.
      kernel: attention kernel; None: by backend and dtype (`default_kernel`).
      remat: recompute each block in the backward pass; True, or a `jax.checkpoint` policy.
      perturbing: which blocks are perturbed, and in which rows; it holds arrays, and is for use inside jit. A block is
        told of itself alone. Records show the attention as it is before it is perturbed.
    """

    request: Reader | None = IMAGE_TO_TEXT
    kernel: Kernel | None = None
    remat: bool | Callable = False
    perturbing: Perturbing | PerturbingBlock | None = None

    def about(self, conditioning: TextConditioning) -> ForwardOptions:
        """With what is asked by name found in the text. Raises ValueError when it is not there."""
        request, perturbing = self.request, self.perturbing
        if request is None and perturbing is None:
            return self
        request = request and request.about(conditioning)
        perturbing = perturbing.about(conditioning) if isinstance(perturbing, Perturbing) else perturbing
        return replace(self, request=request, perturbing=perturbing)


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


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class JointQKV:
    """All that a block's attention record is made of: queries, keys and values of the joint sequence, image first.

    Attributes:
      normalizer: log-normaliser of each query's softmax, of all queries or of the image's; None: not computed.
      image_tokens: how many tokens are the image's. Static.
      last_count: how many equal tokens the last one stands for. Static.
    """

    q: Float[Array, "batch tokens heads head_dim"] | Any  # JAX rebuilds pytrees with stand-ins for arrays
    k: Float[Array, "batch tokens heads head_dim"] | Any
    v: Float[Array, "batch tokens heads head_dim"] | Any
    normalizer: Float[Array, "batch heads queries"] | Any | None
    image_tokens: int = field(metadata={"static": True})
    last_count: int = field(metadata={"static": True})

    def with_every_token(self) -> JointQKV:
        """Repeats the last token, and its log-normaliser, as often as it stands for others."""
        q, k, v = (repeat_last(x, self.last_count, axis=1) for x in (self.q, self.k, self.v))
        normalizer = self.normalizer
        if normalizer is not None and normalizer.shape[2] > self.image_tokens:
            normalizer = repeat_last(normalizer, self.last_count, axis=2)
        return JointQKV(q, k, v, normalizer, self.image_tokens, 1)


def join(image: QKV, text: QKV) -> JointQKV:
    q, k, v = (jnp.concatenate(pair, axis=1) for pair in ((image.q, text.q), (image.k, text.k), (image.v, text.v)))
    return JointQKV(q, k, v, None, image.q.shape[1], text.last_count)


def joint_attention(
    image: QKV, text: QKV, options: ForwardOptions = UNRECORDED
) -> tuple[Float[Array, "batch image heads head_dim"], Float[Array, "batch text heads head_dim"], JointQKV]:
    """Attention over both streams' tokens: the output of each stream, and what the options' request reads."""
    joint, cut, request, perturbing = join(image, text), image.q.shape[1], options.request, options.perturbing
    attended = attend
    if isinstance(perturbing, PerturbingBlock) and isinstance(perturbing.change, Blur):
        attended = partial(perturbed_attend, perturbing=perturbing)
    output, normalizer = attended(
        joint.q,
        joint.k,
        joint.v,
        kernel=options.kernel,
        normalizer=request is not None and bool(request.normalized_queries),
        last_key_count=joint.last_count,
    )
    return output[:, :cut], output[:, cut:], replace(joint, normalizer=normalizer)


def attention_record(image: QKV, text: QKV, options: ForwardOptions = DEFAULT_OPTIONS) -> Any:
    """The record alone: nothing after q and k is computed (values are returned if requested, but not used).

    Raises ValueError when the options request none.
    """
    joint, request = join(image, text), options.request
    if request is None:
        raise ValueError("no record is requested: expected options with a request")
    normalizer = None
    if request.normalized_queries:
        queries = image.q if request.normalized_queries == ("image",) else joint.q
        normalizer = log_normalizer(queries, joint.k, kernel=options.kernel, last_key_count=joint.last_count)
    return request.read(replace(joint, normalizer=normalizer))
