"""Three attention kernels, one contract: output and log-normaliser of softmax attention, with exact gradients."""

from __future__ import annotations

import functools
import os
import subprocess
import sys
import types

import jax
import jax.numpy as jnp
import jaxtyping
import numpy as np
import pytest

from seg4diff_jax.models.attention import QKV, AttentionRequest, ForwardOptions, attention_record, joint_attention
from seg4diff_jax.models.kernels import Kernel, attend, default_kernel, log_normalizer
from tests.reference.largest_array import largest_array
from tests.reference.processes import flags

KERNELS = {
    "xla": Kernel("xla"),
    "xla in chunks": Kernel("xla", query_chunk=48),
    "splash": Kernel("splash", interpret=True),
}


def draw(*shape: int, seed: int = 0, dtype=jnp.float32) -> jax.Array:
    return jnp.asarray(np.random.default_rng(seed).standard_normal(shape), dtype)


@pytest.fixture(params=KERNELS)
def kernel(request) -> Kernel:
    return KERNELS[request.param]


def explicit(q, k, v):
    scores = jnp.einsum("bqhd,bkhd->bhqk", q, k) / q.shape[-1] ** 0.5
    return jnp.einsum("bhqk,bkhd->bqhd", jax.nn.softmax(scores, -1), v), jax.nn.logsumexp(scores, -1)


# Lengths on both sides of splash attention's tiles: padded queries, padded keys, both, neither.
@pytest.mark.parametrize(("queries", "keys"), [(150, 230), (128, 230), (150, 256), (128, 128)])
def test_output_normaliser_and_all_gradients_are_exact(kernel, queries, keys):
    q, k, v = draw(2, queries, 3, 16), draw(2, keys, 3, 16, seed=1), draw(2, keys, 3, 16, seed=2)
    output_weight, normalizer_weight = draw(2, queries, 3, 16, seed=3), draw(2, 3, queries, seed=4)

    def loss(attention, q, k, v):
        output, normalizer = attention(q, k, v)
        return (output * output_weight).sum() + (normalizer * normalizer_weight).sum(), (output, normalizer)

    ours = functools.partial(attend, kernel=kernel, normalizer=True)
    values, gradients = {}, {}
    for name, attention in {"ours": ours, "explicit": explicit}.items():
        run = jax.jit(jax.value_and_grad(functools.partial(loss, attention), argnums=(0, 1, 2), has_aux=True))
        (_, values[name]), gradients[name] = run(q, k, v)
    for mine, expected in zip(
        jax.tree.leaves((values["ours"], gradients["ours"])),
        jax.tree.leaves((values["explicit"], gradients["explicit"])),
        strict=True,
    ):
        assert float(jnp.abs(mine - expected).max() / jnp.abs(expected).max()) <= 1e-5


def test_a_normaliser_that_is_not_read_changes_no_gradient(kernel):
    q, k, v, weight = (draw(2, length, 3, 16, seed=i) for i, length in enumerate((70, 90, 90, 70)))
    loss = lambda normalizer, *x: (attend(*x, kernel=kernel, normalizer=normalizer)[0] * weight).sum()
    with_it, without = (
        jax.grad(functools.partial(loss, normalizer), (0, 1, 2))(q, k, v) for normalizer in (True, False)
    )
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-6), with_it, without)


def test_normaliser_without_values_is_the_same(kernel):
    q, k = draw(2, 70, 3, 16), draw(2, 90, 3, 16, seed=1)
    expected = explicit(q, k, k)[1]
    np.testing.assert_allclose(log_normalizer(q, k, kernel=kernel), expected, rtol=1e-5, atol=1e-5)
    gradient = jax.grad(lambda q, k: jnp.sin(log_normalizer(q, k, kernel=kernel)).sum(), argnums=(0, 1))(q, k)
    wanted = jax.grad(lambda q, k: jnp.sin(explicit(q, k, k)[1]).sum(), argnums=(0, 1))(q, k)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-5), gradient, wanted)


def test_normaliser_is_float32_for_bfloat16_inputs(kernel):
    q, k = draw(1, 70, 2, 16, dtype=jnp.bfloat16), draw(1, 90, 2, 16, seed=1, dtype=jnp.bfloat16)
    output, normalizer = attend(q, k, k, kernel=kernel, normalizer=True)
    assert output.dtype == jnp.bfloat16
    assert normalizer.dtype == jnp.float32
    exact = explicit(q.astype(jnp.float32), k.astype(jnp.float32), k.astype(jnp.float32))[1]
    # Far below a bfloat16's spacing at this size (0.03): the normaliser was never rounded to it.
    np.testing.assert_allclose(normalizer, exact, atol=2e-3)


def test_rows_of_probabilities_over_all_keys_sum_to_one(kernel):
    def stream(tokens: int, seed: int) -> QKV:
        return QKV(*(draw(1, tokens, 2, 16, seed=seed + i, dtype=jnp.bfloat16) for i in range(3)))

    request = AttentionRequest(quadrants=("image_to_text", "image_to_image"), text_tokens=(0, None))
    record = attention_record(stream(60, 0), stream(30, 7), ForwardOptions(request, kernel))
    total = record.image_to_text.probs.sum(-1) + record.image_to_image.probs.sum(-1)
    np.testing.assert_allclose(total, 1, atol=2e-3)


def test_a_captured_map_costs_no_array_of_tokens_by_tokens():
    tokens, text, heads = 4096, 154, 24
    shape = lambda n: QKV(*(jax.ShapeDtypeStruct((1, n, heads, 64), jnp.float32) for _ in range(3)))

    def capture(image, text):
        request = AttentionRequest(text_tokens=(0, 77))
        output, _, joint = joint_attention(image, text, ForwardOptions(request, Kernel("xla")))
        return output.sum() + request.read(joint).probs.sum()

    for function in (capture, jax.grad(capture, argnums=(0, 1))):
        assert largest_array(function, shape(tokens), shape(text)) < tokens * tokens


def test_kernels_are_chosen_by_backend_and_dtype(monkeypatch):
    assert default_kernel(jnp.bfloat16, 64).name == "xla"
    monkeypatch.setattr(jax, "default_backend", lambda: "tpu")
    assert default_kernel(jnp.bfloat16, 64).name == "splash"
    assert default_kernel(jnp.float32, 64).name == "xla"


@pytest.mark.parametrize(
    ("capability", "platform", "dtype", "head_dim", "name"),
    [
        ("9.0", "PJRT C API\ncuda 13000", jnp.bfloat16, 256, "cudnn"),
        ("9.0", "PJRT C API\ncuda 13000", jnp.bfloat16, 264, "xla"),
        ("12.0", "PJRT C API\ncuda 13000", jnp.float16, 64, "cudnn"),
        ("8.6", "PJRT C API\ncuda 13000", jnp.bfloat16, 128, "cudnn"),
        ("8.6", "PJRT C API\ncuda 13000", jnp.bfloat16, 136, "xla"),
        ("8.0", "PJRT C API\ncuda 13000", jnp.bfloat16, 60, "xla"),
        ("8.0", "PJRT C API\ncuda 13000", jnp.float32, 64, "xla"),
        ("7.5", "PJRT C API\ncuda 13000", jnp.float16, 64, "xla"),
        ("gfx942", "PJRT C API\nrocm 60300", jnp.bfloat16, 64, "xla"),
    ],
)
def test_cudnn_is_chosen_where_it_takes_the_dtype_and_the_heads(
    monkeypatch, capability, platform, dtype, head_dim, name
):
    client = types.SimpleNamespace(platform_version=platform)
    device = types.SimpleNamespace(compute_capability=capability, client=client)
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    monkeypatch.setattr(jax, "local_devices", lambda: [device])
    assert default_kernel(dtype, head_dim).name == name


def test_cudnn_kernel_lowers_to_flash_attention_with_float32_statistics(monkeypatch):
    from jax._src.cudnn import fused_attention_stablehlo

    # Lowering for CUDA needs no GPU, only to be told which cuDNN it is for.
    monkeypatch.setattr(fused_attention_stablehlo, "check_cudnn_version", lambda: 91000)
    q = jax.ShapeDtypeStruct((2, 200, 4, 64), jnp.bfloat16)
    k = jax.ShapeDtypeStruct((2, 260, 4, 64), jnp.bfloat16)

    def loss(q, k, v):
        output, normalizer = attend(q, k, v, kernel=Kernel("cudnn"), normalizer=True)
        return output.astype(jnp.float32).sum() + normalizer.sum()

    forward = jax.jit(loss).trace(q, k, k).lower(lowering_platforms=("cuda",)).as_text()
    assert "__cudnn$fmhaSoftmax" in forward
    assert "tensor<2x4x200xf32>" in forward
    backward = jax.jit(jax.grad(loss, argnums=(0, 1, 2))).trace(q, k, k).lower(lowering_platforms=("cuda",)).as_text()
    assert backward.count("__cudnn$fmhaSoftmaxBackward") == 2


def bfloat16_gradients(kernel: Kernel) -> tuple[tuple[jax.Array, ...], tuple[jax.Array, ...]]:
    """Gradients to q, k and v of a random functional of output and normaliser: by the kernel, and exact in fp32."""
    q, k, v = (draw(2, 150, 3, 64, seed=i, dtype=jnp.bfloat16) for i in range(3))
    output_weight, normalizer_weight = draw(2, 150, 3, 64, seed=3), draw(2, 3, 150, seed=4)

    def loss(attention, q, k, v):
        output, normalizer = attention(q, k, v)
        return (output * output_weight).sum() + (normalizer * normalizer_weight).sum()

    ours = functools.partial(loss, functools.partial(attend, kernel=kernel, normalizer=True))
    exact = functools.partial(loss, explicit)
    wide = [x.astype(jnp.float32) for x in (q, k, v)]
    return jax.jit(jax.grad(ours, (0, 1, 2)))(q, k, v), jax.jit(jax.grad(exact, (0, 1, 2)))(*wide)


def assert_near(gradients, expected):
    for mine, exact in zip(gradients, expected, strict=True):
        assert mine.dtype == jnp.bfloat16
        # bfloat16 holds 8 bits: half a unit in the last place is 0.2 %; several roundings meet here.
        assert float(jnp.abs(mine.astype(jnp.float32) - exact).max() / jnp.abs(exact).max()) <= 1e-2


def test_gradients_in_bfloat16_are_those_of_float32_rounded(kernel):
    assert_near(*bfloat16_gradients(kernel))


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Kernel("flash"), "no attention kernel is called 'flash'; there are xla, cudnn, splash"),
        (lambda: Kernel("xla", query_chunk=0), "query_chunk is 0"),
        (lambda: AttentionRequest(quadrants=("image_to_txt",)), "no quadrant is called 'image_to_txt'"),
        (lambda: AttentionRequest(text_tokens=(5, 5)), r"text_tokens is \(5, 5\)"),
    ],
)
def test_requests_that_mean_nothing_are_refused(make, message, monkeypatch):
    monkeypatch.setattr(jaxtyping.config, "jaxtyping_disable", True)  # as for users: types are checked in tests only
    with pytest.raises(ValueError, match=message):
        make()


def test_text_tokens_past_the_text_are_refused():
    q = QKV(*(draw(1, 6, 2, 8),) * 3)
    with pytest.raises(ValueError, match=r"text_tokens is \(6, 9\); this text has 6 tokens"):
        attention_record(q, q, ForwardOptions(AttentionRequest(text_tokens=(6, 9)), Kernel("xla")))


def test_float32_is_multiplied_as_float32_on_accelerators():
    q = jax.ShapeDtypeStruct((1, 16, 2, 64), jnp.float32)
    lowered = jax.jit(lambda q: attend(q, q, q, kernel=Kernel("xla"))).trace(q).lower(lowering_platforms=("cuda",))
    products = [line for line in lowered.as_text().splitlines() if "dot_general" in line]
    assert len(products) == 2
    assert all("precision = [HIGHEST, HIGHEST]" in line for line in products)


@pytest.mark.gpu
@pytest.mark.skipif(jax.default_backend() != "gpu", reason="needs an NVIDIA GPU")
def test_cudnn_kernel_is_exact_on_a_gpu():
    q, k, v = (draw(2, 200, 4, 64, seed=i, dtype=jnp.bfloat16) for i in range(3))
    _, normalizer = attend(q, k, v, kernel=Kernel("cudnn"), normalizer=True)
    np.testing.assert_allclose(normalizer, explicit(*(x.astype(jnp.float32) for x in (q, k, v)))[1], atol=2e-3)
    assert_near(*bfloat16_gradients(Kernel("cudnn")))


MESHES = """
import jax, jax.numpy as jnp, numpy as np
from seg4diff_jax.models.kernels import Kernel, attend
from seg4diff_jax.parallel import make_mesh
draw = lambda batch, heads, i: jax.random.normal(jax.random.key(i), (batch, 130, heads, 16))
for sizes, batch, heads in [((4, 1, 2), 1, 6), ((2, 1, 4), 4, 6), ((2, 2, 2), 3, 5), ((8, 1, 1), 8, 3)]:
    q, k, v = (draw(batch, heads, i) for i in range(3))
    whole = attend(q, k, v, kernel=Kernel("xla"), normalizer=True)
    with jax.set_mesh(make_mesh(*sizes)):
        split = jax.jit(lambda *x: attend(*x, kernel=Kernel("splash", interpret=True), normalizer=True))(q, k, v)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-5), split, whole)
print("same")
"""


def test_splash_on_a_mesh_is_the_same_whether_or_not_batch_and_heads_divide():
    environment = os.environ | {"JAX_PLATFORMS": "cpu"} | flags("--xla_force_host_platform_device_count=8")
    done = subprocess.run([sys.executable, "-c", MESHES], env=environment, capture_output=True, text=True, check=False)
    assert done.stdout.strip() == "same", done.stderr[-3000:]


def test_a_last_key_that_stands_for_several_equals_them(kernel):
    q, k, v = draw(2, 100, 3, 16), draw(2, 150, 3, 16, seed=1), draw(2, 150, 3, 16, seed=2)

    def loss(spread: bool, q, k, v):
        if spread:
            k, v = (jnp.concatenate([x, *[x[:, -1:]] * 29], axis=1) for x in (k, v))
        output, normalizer = attend(q, k, v, kernel=kernel, normalizer=True, last_key_count=1 if spread else 30)
        alone = log_normalizer(q, k, kernel=kernel, last_key_count=1 if spread else 30)
        return jnp.square(output).sum() + jnp.square(normalizer).sum(), (output, normalizer, alone)

    run = lambda spread: jax.jit(jax.value_and_grad(functools.partial(loss, spread), (0, 1, 2), has_aux=True))(q, k, v)
    ((_, values), gradients), ((_, expected_values), expected_gradients) = run(False), run(True)
    expected = jax.tree.leaves((expected_values, expected_gradients))
    for mine, theirs in zip(jax.tree.leaves((values, gradients)), expected, strict=True):
        np.testing.assert_allclose(mine, theirs, atol=1e-5 * float(jnp.abs(theirs).max()))
