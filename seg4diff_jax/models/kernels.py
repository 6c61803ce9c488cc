"""Softmax attention and its log-normaliser. One function calls one of three kernels:

xla     plain XLA operations in chunks of queries: any backend, bounded memory; fp32 inputs are multiplied as fp32.
cudnn   cuDNN's flash attention: NVIDIA GPUs, bf16 and fp16.
splash  JAX's splash attention: TPUs, bf16.

cuDNN and splash return a log-normaliser too, but without gradients, and rounded to the input's dtype in the public
functions. Here it is fp32, and its derivative is written out: d logsumexp(s_i) / d s_ij = p_ij. So the gradient to q is
attention with the keys as values, and the gradient to k is the gradient of that attention to its values.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec
from jax.typing import DTypeLike
from jaxtyping import Array, Float

from seg4diff_jax.checked import Checked

Tokens = Float[Array, "batch _ heads head_dim"]
HeadsFirst = Float[Array, "batch heads _ head_dim"]
Values = Float[Array, "batch _ heads value_dim"]
ValuesFirst = Float[Array, "batch heads _ value_dim"]

CHUNK_BYTES = 16 * 2**20
"""Most bytes of fp32 scores in one chunk of the xla kernel: about the size of a last-level cache."""


@dataclass(frozen=True)
class Kernel(Checked):
    """The choice of an attention kernel and of its options. Static under jit.

    Attributes:
      name: one of the kernels in the module's docstring.
      query_chunk: queries per chunk (xla only); None: as many as keep a chunk's scores within CHUNK_BYTES.
      interpret: run splash attention in Pallas' interpreter, on any backend (for tests).
    """

    name: Literal["xla", "cudnn", "splash"]
    query_chunk: int | None = None
    interpret: bool = False

    def problems(self) -> list[str]:
        """Returns what is wrong with the options, one sentence for each problem."""
        found = []
        if self.name not in ("xla", *FUSED):
            found.append(f"no attention kernel is called {self.name!r}; there are xla, {', '.join(FUSED)}")
        if self.query_chunk is not None and self.query_chunk < 1:
            found.append(f"query_chunk is {self.query_chunk}; expected at least 1, or None")
        return found


def default_kernel(dtype: DTypeLike, head_dim: int) -> Kernel:
    """Returns the backend's fused kernel if it takes this dtype and head width, otherwise xla.

    The backend is that of the mesh in context, or the default backend without a mesh. The mesh may be abstract: its
    devices need not exist on this machine.
    """
    device = jax.sharding.get_abstract_mesh().abstract_device
    backend = jax.default_backend() if device is None else device.platform
    if backend == "gpu" and dtype in (jnp.bfloat16, jnp.float16) and head_dim % 8 == 0 and head_dim <= _cudnn_width():
        return Kernel("cudnn")
    if backend == "tpu" and dtype == jnp.bfloat16:
        return Kernel("splash")
    return Kernel("xla")


def _cudnn_width() -> int:
    """Returns the widest heads that cuDNN's flash attention takes here; 0 on AMD's GPUs and before Ampere (8.0)."""
    device = jax.local_devices()[0]
    if "rocm" in device.client.platform_version.lower():
        return 0
    major = int(device.compute_capability.split(".")[0])
    return 256 if major >= 9 else 128 if major == 8 else 0


def attend(
    q: Float[Array, "batch queries heads head_dim"],
    k: Float[Array, "batch keys heads head_dim"],
    v: Float[Array, "batch keys heads value_dim"],
    *,
    kernel: Kernel | None = None,
    normalizer: bool = False,
    last_key_count: int = 1,
) -> tuple[Float[Array, "batch queries heads value_dim"], Float[Array, "batch heads queries"] | None]:
    """Computes softmax(q k^T / sqrt(head_dim)) v and, on request, the log-normaliser of each softmax in fp32.

    The log-normaliser is log sum_j exp(q_i.k_j / sqrt(head_dim)). Both outputs have exact gradients to q, k and v.

    Args:
      v: values, with xla of any width; the fused kernels take those that are as wide as a head.
      kernel: the attention kernel. Default: the one that `default_kernel` chooses.
      normalizer: return the log-normaliser; a kernel that computes it anyway returns it in any case.
      last_key_count: the last key and value stand for this many equal ones.
    """
    kernel = kernel or default_kernel(q.dtype, q.shape[-1])
    if kernel.name == "xla":
        output, log_total = _attend_xla(q, k, v, kernel.query_chunk, last_key_count)
        assert output is not None
        return output, log_total
    k, v = (repeat_last(x, last_key_count, axis=1) for x in (k, v))
    if not normalizer:
        return FUSED[kernel.name](q, k, v, kernel)[0], None
    return _attend_fused(q, k, v, kernel)


def log_normalizer(
    q: Float[Array, "batch queries heads head_dim"],
    k: Float[Array, "batch keys heads head_dim"],
    *,
    kernel: Kernel | None = None,
    last_key_count: int = 1,
) -> Float[Array, "batch heads queries"]:
    """Computes log sum_j exp(q_i.k_j / sqrt(head_dim)) in fp32, differentiable, without values.

    Arguments are as for `attend`.
    """
    kernel = kernel or default_kernel(q.dtype, q.shape[-1])
    if kernel.name == "xla":
        return _attend_xla(q, k, None, kernel.query_chunk, last_key_count)[1]
    k = repeat_last(k, last_key_count, axis=1)
    fused: Any = _attend_fused(q, k, k, kernel)
    return fused[1]


def repeat_last(x: Float[Array, "*shape"], count: int, axis: int) -> Float[Array, "*longer"]:
    """Repeats the last entry along an axis, so that there are `count` of it."""
    last = jax.lax.slice_in_dim(x, x.shape[axis] - 1, x.shape[axis], axis=axis)
    return jnp.concatenate([x, *[last] * (count - 1)], axis=axis) if count > 1 else x


# ---- xla ------------------------------------------------------------------------------------------------------------


def _attend_xla(
    q: Tokens, k: Tokens, v: Values | None, query_chunk: int | None, last_key_count: int
) -> tuple[Values | None, Float[Array, "batch heads queries"]]:
    batch, queries, heads, head_dim = q.shape
    if query_chunk is None:
        query_chunk = max(1, CHUNK_BYTES // (4 * batch * heads * k.shape[1]))
    # Heads first, once: XLA on CPUs would otherwise copy keys and values for each chunk, and the weights too.
    q, k = jnp.moveaxis(q, 2, 1), jnp.moveaxis(k, 2, 1)
    v = None if v is None else jnp.moveaxis(v, 2, 1)
    chunks = -(-queries // query_chunk)
    if chunks == 1:
        output, normalizer = _softmax_chunk(q, k, v, last_key_count)
        return None if output is None else jnp.moveaxis(output, 1, 2), normalizer
    size = -(-queries // chunks)
    padded = jnp.pad(q, ((0, 0), (0, 0), (0, chunks * size - queries), (0, 0)))
    pieces = jnp.moveaxis(padded.reshape(batch, heads, chunks, size, head_dim), 2, 0)
    output, normalizer = jax.lax.map(lambda piece: _softmax_chunk_again(piece, k, v, last_key_count), pieces)
    if output is not None:
        output = jnp.transpose(output, (1, 0, 3, 2, 4)).reshape(batch, chunks * size, heads, -1)[:, :queries]
    return output, jnp.moveaxis(normalizer, 0, 2).reshape(batch, heads, chunks * size)[:, :, :queries]


def _softmax_chunk(q: HeadsFirst, k: HeadsFirst, v: ValuesFirst | None, last_key_count: int):
    scores = _scores("bhqd,bhkd->bhqk", q, k)
    if last_key_count > 1:
        # n equal keys weigh n times as much as one key. Their values are equal too, so one value serves.
        scores += jnp.where(jnp.arange(k.shape[2]) == k.shape[2] - 1, math.log(last_key_count), 0.0)
    largest = jax.lax.stop_gradient(scores.max(axis=-1, keepdims=True))
    weights = jnp.exp(scores - largest)
    total = weights.sum(axis=-1)
    normalizer = jnp.log(total) + largest[..., 0]
    if v is None:
        return None, normalizer
    output = jnp.einsum(
        "bhqk,bhkd->bhqd", weights.astype(v.dtype), v, preferred_element_type=jnp.float32, precision=_precision(v)
    )
    return (output / total[..., None]).astype(v.dtype), normalizer


@partial(jax.custom_vjp, nondiff_argnums=(3,))
def _softmax_chunk_again(q: HeadsFirst, k: HeadsFirst, v: ValuesFirst | None, last_key_count: int):
    """Does as `_softmax_chunk`, and recomputes the scores in the backward pass.

    An outer `jax.checkpoint` policy cannot make it keep them.
    """
    return _softmax_chunk(q, k, v, last_key_count)


def _softmax_chunk_forward(q: HeadsFirst, k: HeadsFirst, v: ValuesFirst | None, last_key_count: int):
    return _softmax_chunk(q, k, v, last_key_count), (q, k, v)


def _softmax_chunk_backward(last_key_count: int, residuals, cotangents):
    return jax.vjp(partial(_softmax_chunk, last_key_count=last_key_count), *residuals)[1](cotangents)


_softmax_chunk_again.defvjp(_softmax_chunk_forward, _softmax_chunk_backward)


def attention_scores(
    q: Float[Array, "batch queries heads head_dim"], k: Float[Array, "batch keys heads head_dim"]
) -> Float[Array, "batch heads queries keys"]:
    """Computes q.k / sqrt(head_dim) in fp32."""
    return _scores("bqhd,bkhd->bhqk", q, k)


def _scores(axes: str, q: Array, k: Array) -> Float[Array, "batch heads queries keys"]:
    scores = jnp.einsum(axes, q, k, preferred_element_type=jnp.float32, precision=_precision(q))
    return scores * q.shape[-1] ** -0.5


def _precision(x: Array) -> jax.lax.Precision | None:
    # By default, accelerators multiply fp32 in fewer bits.
    return jax.lax.Precision.HIGHEST if x.dtype == jnp.float32 else None


# ---- fused kernels --------------------------------------------------------------------------------------------------


@partial(jax.custom_vjp, nondiff_argnums=(3,))
def _attend_fused(
    q: Tokens, k: Tokens, v: Tokens, kernel: Kernel
) -> tuple[Tokens, Float[Array, "batch heads queries"]]:
    return FUSED_WITH_NORMALIZER[kernel.name](q, k, v, kernel)


def _attend_fused_forward(q: Tokens, k: Tokens, v: Tokens, kernel: Kernel):
    return _attend_fused(q, k, v, kernel), (q, k, v)


def _attend_fused_backward(kernel: Kernel, residuals, cotangents):
    q, k, v = residuals
    output_bar, normalizer_bar = cotangents

    def plain(q: Tokens, k: Tokens, v: Tokens):
        return FUSED[kernel.name](q, k, v, kernel)[0]

    def of_normalizer():
        mean_key, pull_values = jax.vjp(partial(plain, q, k), k)
        weight = jnp.moveaxis(normalizer_bar, 1, 2)[..., None] * q.shape[-1] ** -0.5
        return (weight * mean_key).astype(q.dtype), pull_values((weight * q).astype(k.dtype))[0]

    q_bar, k_bar, v_bar = jax.vjp(plain, q, k, v)[1](output_bar)
    # One scan runs captured blocks and others, whose normaliser nobody reads: its gradient is zero in them.
    is_read = jnp.any(normalizer_bar != 0)
    more_q, more_k = jax.lax.cond(is_read, of_normalizer, lambda: (jnp.zeros_like(q), jnp.zeros_like(k)))
    return q_bar + more_q, k_bar + more_k, v_bar


_attend_fused.defvjp(_attend_fused_forward, _attend_fused_backward)


def _cudnn(q: Tokens, k: Tokens, v: Tokens, kernel: Kernel):
    return jax.nn.dot_product_attention(q, k, v, implementation="cudnn"), None


def _cudnn_with_normalizer(q: Tokens, k: Tokens, v: Tokens, kernel: Kernel):
    # The public function rounds the fp32 normaliser to the inputs' dtype; this private one does not.
    from jax._src.cudnn.fused_attention_stablehlo import dot_product_attention

    fused: Any = dot_product_attention(q, k, v, scale=q.shape[-1] ** -0.5, return_residual=True)
    return fused[0], fused[1].astype(jnp.float32)


def _splash(q: Tokens, k: Tokens, v: Tokens, kernel: Kernel):
    return _splash_attention(q, k, v, kernel, normalizer=False), None


def _splash_with_normalizer(q: Tokens, k: Tokens, v: Tokens, kernel: Kernel):
    output, residuals = _splash_attention(q, k, v, kernel, normalizer=True)
    return output, jax.tree.leaves(residuals)[0]


SPLASH_BLOCK = 512
"""Queries and keys per tile. Lengths are padded to multiples of this, or of 128 when shorter."""


def _splash_attention(q: Tokens, k: Tokens, v: Tokens, kernel: Kernel, normalizer: bool):
    """Runs splash attention, on a mesh with the batch split over `data` and `fsdp` and the heads over `tensor`.

    Only axes that the mesh in context has are used. A batch, or a number of heads, that does not divide is not split:
    each device then computes all of it.
    """
    attention = partial(_splash_local, kernel=kernel, normalizer=normalizer)
    mesh = jax.sharding.get_abstract_mesh()
    if not mesh.axis_names:
        return attention(q, k, v)
    batch_axes = tuple(axis for axis in ("data", "fsdp") if axis in mesh.axis_names)
    if q.shape[0] % math.prod(mesh.shape[axis] for axis in batch_axes):
        batch_axes = ()
    head_axis = "tensor" if "tensor" in mesh.axis_names and q.shape[2] % mesh.shape["tensor"] == 0 else None
    tokens = PartitionSpec(batch_axes or None, None, head_axis, None)
    outputs = (tokens, (PartitionSpec(batch_axes or None, head_axis, None),)) if normalizer else tokens
    return jax.shard_map(attention, in_specs=(tokens,) * 3, out_specs=outputs, check_vma=False)(q, k, v)


def _splash_local(q: Tokens, k: Tokens, v: Tokens, kernel: Kernel, normalizer: bool):
    from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_kernel, splash_attention_mask

    queries, keys, heads = q.shape[1], k.shape[1], q.shape[2]
    query_block, key_block = (min(SPLASH_BLOCK, -(-length // 128) * 128) for length in (queries, keys))
    q = _heads_first(q * q.shape[-1] ** -0.5, query_block).astype(q.dtype)
    k, v = _heads_first(k, key_block), _heads_first(v, key_block)
    mask = splash_attention_mask.FullMask((q.shape[2], k.shape[2]))
    attention = splash_attention_kernel.make_splash_mha(
        splash_attention_mask.MultiHeadMask([mask] * heads),
        block_sizes=splash_attention_kernel.BlockSizes(
            block_q=query_block,
            block_kv=key_block,
            block_q_dkv=query_block,
            block_kv_dkv=key_block,
            block_q_dq=query_block,
            block_kv_dq=key_block,
        ),
        head_shards=1,
        q_seq_shards=1,
        save_residuals=normalizer,
        interpret=kernel.interpret,
    )
    # Padding is a segment of its own: real queries never attend to it, and padded queries attend only to padded keys.
    # Without padded keys, padded queries attend to real keys instead. Their outputs are cut off below.
    query_segments = jnp.where(jnp.arange(q.shape[2]) < queries, 0, 0 if k.shape[2] == keys else 1)
    key_segments = (jnp.arange(k.shape[2]) >= keys).astype(jnp.int32)
    segments = splash_attention_kernel.SegmentIds(q=query_segments, kv=key_segments)
    result: Any = jax.vmap(attention, in_axes=(0, 0, 0, None))(q, k, v, segments)
    if normalizer:
        output, residuals = result
        return jnp.moveaxis(output[:, :, :queries], 1, 2), (jax.tree.leaves(residuals)[0][:, :, :queries],)
    return jnp.moveaxis(result[:, :, :queries], 1, 2)


def _heads_first(x: Tokens, block: int) -> Float[Array, "batch heads tokens head_dim"]:
    """Moves heads before tokens, and pads tokens with zeros to whole blocks."""
    return jnp.pad(jnp.moveaxis(x, 2, 1), ((0, 0), (0, 0), (0, -x.shape[1] % block), (0, 0)))


FUSED: dict[str, Callable] = {"cudnn": _cudnn, "splash": _splash}
FUSED_WITH_NORMALIZER: dict[str, Callable] = {"cudnn": _cudnn_with_normalizer, "splash": _splash_with_normalizer}
