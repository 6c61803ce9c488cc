"""The autoencoder equals diffusers' AutoencoderKL: moments, latents, pixels, gradients; and its memory is bounded."""

from __future__ import annotations

import functools
import gc

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from diffusers import AutoencoderKL
from diffusers.loaders.single_file_utils import convert_ldm_vae_checkpoint
from flax import nnx

from seg4diff_jax.convert.assemble import abstract, from_state_dict
from seg4diff_jax.convert.names import assign_back, parameter_shapes
from seg4diff_jax.convert.tables import vae as table
from seg4diff_jax.models import vae as vae_module
from seg4diff_jax.models.vae import VAE, GroupNorm, VAEConfig, chunked_attention
from tests.reference.largest_array import largest_array
from tests.reference.random_weights import randomize_, relative_error

SD3 = {
    "_class_name": "AutoencoderKL",
    "act_fn": "silu",
    "block_out_channels": [128, 256, 512, 512],
    "down_block_types": ["DownEncoderBlock2D"] * 4,
    "force_upcast": True,
    "in_channels": 3,
    "latent_channels": 16,
    "layers_per_block": 2,
    "mid_block_add_attention": True,
    "norm_num_groups": 32,
    "out_channels": 3,
    "sample_size": 1024,
    "scaling_factor": 1.5305,
    "shift_factor": 0.0609,
    "up_block_types": ["UpDecoderBlock2D"] * 4,
    "use_post_quant_conv": False,
    "use_quant_conv": False,
}
"""The published vae/config.json of SD3-medium and SD3.5."""


def small(*widths: int, **changes) -> dict:
    levels = len(widths)
    return SD3 | {
        "block_out_channels": list(widths),
        "down_block_types": ["DownEncoderBlock2D"] * levels,
        "up_block_types": ["UpDecoderBlock2D"] * levels,
        "norm_num_groups": 8,
        **changes,
    }


CASES = {
    "like SD3": (small(16, 32, 48, 48), (64, 64)),
    "wide image": (small(16, 32, 48, 48), (32, 80)),
    "quant convs, no shift, as in SD1.5": (
        small(16, 24, latent_channels=4, use_quant_conv=True, use_post_quant_conv=True, shift_factor=None),
        (32, 48),
    ),
    "quant conv on one side only": (small(16, 24, use_quant_conv=True), (24, 24)),
    "no attention": (small(16, 32, mid_block_add_attention=False), (24, 32)),
    "three blocks a level": (small(16, 16, 32, layers_per_block=3, latent_channels=5), (40, 24)),
    "one level, one block": (small(24, layers_per_block=1), (12, 20)),
    "odd sizes at every level": (small(16, 32, 48), (54, 37)),
    "four channels in and out": (small(16, 24, in_channels=4, out_channels=4, norm_num_groups=4), (16, 24)),
}


def make_pair(json: dict, seed: int = 0) -> tuple[AutoencoderKL, VAE]:
    theirs = randomize_(AutoencoderKL.from_config(json), seed)
    config = VAEConfig.from_json(json)
    tensors = {name: tensor.numpy() for name, tensor in theirs.state_dict().items()}
    return theirs, from_state_dict(abstract(lambda rngs: VAE(config, rngs=rngs)), table.diffusers(config), tensors)


def draw(*shape: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal(shape, np.float32)


def channels_first(array: np.ndarray) -> torch.Tensor:
    return torch.from_numpy(array).permute(0, 3, 1, 2)


def channels_last(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.permute(0, 2, 3, 1)


def their_latents(theirs: AutoencoderKL, pixels: torch.Tensor) -> torch.Tensor:
    mean = theirs.encode(pixels).latent_dist.mean
    return (mean - (theirs.config.shift_factor or 0)) * theirs.config.scaling_factor


def their_pixels(theirs: AutoencoderKL, latents: torch.Tensor) -> torch.Tensor:
    return theirs.decode(latents / theirs.config.scaling_factor + (theirs.config.shift_factor or 0)).sample


encode = jax.jit(lambda vae, pixels: vae.encode(pixels))
decode = jax.jit(lambda vae, latents: vae.decode(latents))


@pytest.mark.parametrize("case", CASES)
@torch.no_grad()
def test_latents_and_pixels_equal_diffusers(case):
    json, (height, width) = CASES[case]
    theirs, ours = make_pair(json)
    pixels = draw(2, height, width, json["in_channels"])
    latents = encode(ours, pixels)
    assert relative_error(latents, channels_last(their_latents(theirs, channels_first(pixels)))) < 1e-5

    latents = draw(*latents.shape, seed=1)
    assert relative_error(decode(ours, latents), channels_last(their_pixels(theirs, channels_first(latents)))) < 1e-5


@torch.no_grad()
def test_both_moments_equal_diffusers_and_the_variance_is_clipped_alike():
    theirs, _ = make_pair(small(16, 32))
    theirs.encoder.conv_out.weight *= 40
    config = VAEConfig.from_json(small(16, 32))
    tensors = {name: tensor.numpy() for name, tensor in theirs.state_dict().items()}
    ours = from_state_dict(abstract(lambda rngs: VAE(config, rngs=rngs)), table.diffusers(config), tensors)
    pixels = draw(1, 24, 24, 3)
    expected = theirs.encode(channels_first(pixels)).latent_dist
    assert expected.logvar.min() == -30
    assert expected.logvar.max() == 20
    mean, log_variance = ours.moments(jnp.asarray(pixels))
    assert relative_error(mean, channels_last(expected.mean)) < 1e-5
    assert relative_error(log_variance, channels_last(expected.logvar)) < 1e-5


@pytest.mark.parametrize("chunked", [False, True])
def test_gradient_with_respect_to_pixels_equals_autograd(chunked, monkeypatch):
    json = small(16, 32, 48)
    theirs, ours = make_pair(json)
    pixels, cotangent = draw(2, 36, 28, 3), draw(2, 9, 7, 16, seed=1)
    if chunked:
        monkeypatch.setattr(vae_module, "SCORE_BYTES", 4 * (9 * 7) * 10)
    leaf = channels_first(pixels).clone().requires_grad_()
    (their_latents(theirs, leaf) * channels_first(cotangent)).sum().backward()
    gradient = jax.jit(jax.grad(lambda pixels: (ours.encode(pixels) * cotangent).sum()))(jnp.asarray(pixels))
    assert leaf.grad is not None
    assert relative_error(gradient, channels_last(leaf.grad)) < 1e-5


def test_gradient_with_respect_to_every_decoder_parameter_equals_autograd():
    theirs, ours = make_pair(small(16, 32))
    latents, cotangent = draw(1, 8, 6, 16), draw(1, 16, 12, 3, seed=1)
    (their_pixels(theirs, channels_first(latents)) * channels_first(cotangent)).sum().backward()
    expected = {name: p.grad.numpy() for name, p in theirs.named_parameters() if p.grad is not None}
    gradients = jax.jit(jax.grad(lambda vae: (vae.decode(jnp.asarray(latents)) * cotangent).sum()))(ours)
    found = {
        ".".join(map(str, path)): np.asarray(leaf.get_value()) for path, leaf in nnx.to_flat_state(nnx.state(gradients))
    }
    back = assign_back(table.diffusers(ours.config), [name for name in found if name.startswith("decoder.")])
    assert {assignment.source for assignment in back} == set(expected)
    scale = max(np.abs(gradient).max() for gradient in expected.values())
    for source, targets, transform, _ in back:
        error = np.abs(transform.to_torch([found[target] for target in targets]) - expected[source]).max()
        assert error < 1e-5 * scale, source


@pytest.mark.parametrize("rows", [1, 7, 16, 35, 70])
def test_attention_is_the_same_whatever_the_chunk(rows, monkeypatch):
    query, key, value = (jnp.asarray(draw(2, 70, 24, seed=seed)) for seed in range(3))
    scores = np.einsum("bqc,bkc->bqk", *map(np.float64, (query, key))) / np.sqrt(24)
    weights = np.exp(scores - scores.max(-1, keepdims=True))
    expected = np.einsum("bqk,bkc->bqc", weights / weights.sum(-1, keepdims=True), np.float64(value))
    monkeypatch.setattr(vae_module, "SCORE_BYTES", 4 * 70 * rows)
    assert relative_error(np.asarray(chunked_attention(query, key, value)), expected) < 1e-6


def test_norm_keeps_the_variance_of_a_nearly_flat_image():
    image = 1e-2 * draw(2, 32, 24, 8).astype(np.float64) + 300
    image = image.astype(np.float32)
    groups = image.astype(np.float64).reshape(2, 32, 24, 2, 4)
    mean, variance = groups.mean((1, 2, 4), keepdims=True), groups.var((1, 2, 4), keepdims=True)
    expected = ((groups - mean) / np.sqrt(variance + 1e-6)).reshape(image.shape)
    norm = GroupNorm(8, 2, param_dtype=jnp.float32)
    # The mean itself is rounded to fp32: 300 carries an error of 1.5e-5, or 1.5e-3 of the standard deviation.
    assert relative_error(norm(jnp.asarray(image)), expected) < 2e-3


@torch.no_grad()
def test_a_flat_image_gives_exact_latents_and_finite_gradients():
    theirs, ours = make_pair(small(16, 32))
    pixels = np.full((1, 24, 24, 3), -1, np.float32)
    # In fp32 diffusers itself is 1.5e-5 from the fp64 result here, so fp64 is the reference.
    expected = channels_last(their_latents(theirs.double(), channels_first(pixels).double()))
    assert relative_error(encode(ours, pixels), expected) < 1e-5
    assert np.isfinite(jax.jit(jax.grad(lambda x: ours.encode(x).sum()))(jnp.asarray(pixels))).all()


@torch.no_grad()
def test_bf16_stays_as_close_to_fp32_as_diffusers_does():
    """Measured, root mean square over root mean square: latents 1.2 % (diffusers 1.3 %), pixels 2.1 % (2.2 %)."""

    def distance(rounded: jax.Array | torch.Tensor, exact: torch.Tensor) -> float:
        array = rounded.float().numpy() if isinstance(rounded, torch.Tensor) else np.float32(rounded)
        return float(np.sqrt(np.square(array - exact.numpy()).mean() / np.square(exact.numpy()).mean()))

    theirs, ours = make_pair(small(32, 64, 128, 128))
    graph, _ = nnx.split(abstract(lambda rngs: VAE(ours.config, dtype=jnp.bfloat16, rngs=rngs)))
    ours = nnx.merge(graph, jax.tree.map(lambda x: x.astype(jnp.bfloat16), nnx.state(ours)))
    pixels, latents = draw(1, 64, 64, 3), draw(1, 8, 8, 16, seed=1)
    exact_latents = channels_last(their_latents(theirs, channels_first(pixels)))
    exact_pixels = channels_last(their_pixels(theirs, channels_first(latents)))
    theirs = theirs.bfloat16()
    their_distances = (
        distance(channels_last(their_latents(theirs, channels_first(pixels).bfloat16())), exact_latents),
        distance(channels_last(their_pixels(theirs, channels_first(latents).bfloat16())), exact_pixels),
    )
    found_latents, found_pixels = encode(ours, pixels), decode(ours, latents)
    assert found_latents.dtype == found_pixels.dtype == jnp.bfloat16
    our_distances = distance(found_latents, exact_latents), distance(found_pixels, exact_pixels)
    assert our_distances[0] < min(0.016, 1.1 * their_distances[0])
    assert our_distances[1] < min(0.027, 1.1 * their_distances[1])


@functools.cache
def published() -> VAE:
    """SD3's autoencoder in bf16, by shapes alone."""
    return abstract(lambda rngs: VAE(VAEConfig.from_json(SD3), dtype=jnp.bfloat16, rngs=rngs))


def shape(*sizes: int) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(sizes, jnp.bfloat16)


def test_encoding_at_1024_pixels_holds_nothing_larger_than_its_finest_activations():
    assert largest_array(lambda vae, x: vae.encode(x), published(), shape(1, 1024, 1024, 3)) == 1024 * 1024 * 128


def test_decoding_at_1024_pixels_holds_nothing_larger_than_its_finest_activations():
    assert largest_array(lambda vae, z: vae.decode(z), published(), shape(1, 128, 128, 16)) == 1024 * 1024 * 256


def test_decoding_never_makes_tokens_times_tokens():
    # At 1536 pixels, because 256 channels at 1024 x 1024 happen to be the square of its 16384 tokens.
    tokens = 192 * 192
    assert largest_array(lambda vae, z: vae.decode(z), published(), shape(1, 192, 192, 16)) < tokens * tokens


def test_gradients_hold_nothing_larger_than_the_finest_activations():
    loss = lambda vae, x: vae.encode(x).astype(jnp.float32).sum()
    gradient = jax.grad(loss, argnums=(0, 1))
    assert largest_array(gradient, published(), shape(1, 1024, 1024, 3)) == 1024 * 1024 * 128


@pytest.mark.parametrize("batch", [1, 4])
def test_attention_over_16384_tokens_stays_within_its_budget(batch):
    tokens = shape(batch, 128 * 128, 512)
    loss = lambda q, k, v: chunked_attention(q, k, v).astype(jnp.float32).sum()
    for function in (loss, jax.grad(loss, argnums=(0, 1, 2))):
        assert largest_array(function, tokens, tokens, tokens) * 4 == batch * vae_module.SCORE_BYTES


def test_largest_array_sees_inside_loops_and_checkpoints():
    x = jax.ShapeDtypeStruct((30,), jnp.float32)
    outer = lambda x: (x[:, None] * x).sum()
    assert largest_array(lambda x: x * 2, x) == 30
    assert largest_array(outer, x) == 900
    assert largest_array(jax.checkpoint(outer), x) == 900
    assert largest_array(jax.jit(outer), x) == 900
    assert largest_array(lambda x: jax.lax.scan(lambda c, _: (c + outer(x), None), 0.0, None, length=2), x) == 900
    assert largest_array(lambda x: jax.lax.cond(x[0] > 0, outer, jnp.sum, x), x) == 900
    assert largest_array(lambda x: jax.lax.map(lambda row: (row * x).sum(), x), x) == 30


def stability_names(json: dict, state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Stability's spelling of a state dict, by the table read backwards from our names."""
    config = VAEConfig.from_json(json)
    model = abstract(lambda rngs: VAE(config, rngs=rngs))
    tensors = {name: tensor.numpy() for name, tensor in state.items()}
    filled = from_state_dict(model, table.diffusers(config), tensors)
    ours = {".".join(map(str, p)): np.asarray(v.get_value()) for p, v in nnx.to_flat_state(nnx.state(filled))}
    return {
        source: torch.tensor(transform.to_torch([ours[target] for target in targets]))
        for source, targets, transform, _ in assign_back(table.stability(config), parameter_shapes(model))
    }


@pytest.mark.parametrize("case", CASES)
def test_stability_names_are_those_that_diffusers_reads(case):
    json, _ = CASES[case]
    state = randomize_(AutoencoderKL.from_config(json)).state_dict()
    judged = convert_ldm_vae_checkpoint(
        {f"first_stage_model.{name}": tensor for name, tensor in stability_names(json, state).items()}, json
    )
    assert judged.keys() == state.keys()
    for name, tensor in state.items():
        assert torch.equal(judged[name], tensor), name


def test_stability_single_file_fills_the_same_parameters():
    json = small(16, 32, 48, use_quant_conv=True, use_post_quant_conv=True)
    theirs, expected = make_pair(json)
    single_file = {name: tensor.numpy() for name, tensor in stability_names(json, theirs.state_dict()).items()}
    assert single_file["decoder.up.2.block.0.conv1.weight"].shape == (48, 48, 3, 3)
    assert single_file["decoder.up.0.block.0.nin_shortcut.weight"].shape == (16, 32, 1, 1)
    assert single_file["encoder.mid.attn_1.q.weight"].shape == (48, 48, 1, 1)
    config = VAEConfig.from_json(json)
    found = from_state_dict(abstract(lambda rngs: VAE(config, rngs=rngs)), table.stability(config), single_file)
    jax.tree.map(np.testing.assert_array_equal, nnx.state(found), nnx.state(expected))


def test_published_config_is_read():
    config = VAEConfig.from_json(SD3)
    assert config.downsampling == 8
    assert (config.latent_channels, config.scaling_factor, config.shift_factor) == (16, 1.5305, 0.0609)


def test_absent_keys_mean_what_diffusers_means():
    theirs, ours = AutoencoderKL().config, VAEConfig.from_json({})
    for key, value in vars(ours).items():
        assert theirs[key] == value, key


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("act_fn", "relu"),
        ("down_block_types", ["DownEncoderBlock2D"] * 3 + ["AttnDownEncoderBlock2D"]),
        ("up_block_types", ["UpDecoderBlock2D"]),
        ("latents_mean", [0.0] * 16),
        ("_class_name", "AutoencoderTiny"),
        ("norm_num_groups", 48),
    ],
)
def test_variants_that_are_not_implemented_are_refused_by_name(key, value):
    with pytest.raises(ValueError, match=key) as raised:
        VAEConfig.from_json(SD3 | {key: value})
    assert str(value) in str(raised.value)


@pytest.mark.slow
@torch.no_grad()
def test_published_shape_equals_diffusers_at_512_pixels():
    pixels, latents = np.clip(0.5 * draw(1, 512, 512, 3), -1, 1), draw(1, 64, 64, 16, seed=1)
    theirs = randomize_(AutoencoderKL.from_config(SD3))
    expected_latents = channels_last(their_latents(theirs, channels_first(pixels))).clone()
    expected_pixels = channels_last(their_pixels(theirs, channels_first(latents))).clone()
    config = VAEConfig.from_json(SD3)
    tensors = {name: tensor.numpy() for name, tensor in theirs.state_dict().items()}
    ours = from_state_dict(abstract(lambda rngs: VAE(config, rngs=rngs)), table.diffusers(config), tensors)
    del theirs, tensors
    gc.collect()
    assert relative_error(encode(ours, pixels), expected_latents) < 1e-4
    assert relative_error(decode(ours, latents), expected_pixels) < 1e-4
