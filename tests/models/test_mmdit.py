"""The MM-DiT equals diffusers' SD3Transformer2DModel: velocity, every block, every attention map, gradients."""

from __future__ import annotations

import copy
import functools
from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from diffusers import SD3Transformer2DModel
from flax import nnx
from scipy.special import softmax

from seg4diff_jax.convert.assemble import abstract, from_state_dict
from seg4diff_jax.convert.names import parameter_shapes
from seg4diff_jax.convert.tables import mmdit as table
from seg4diff_jax.convert.write import layer_arrays
from seg4diff_jax.models.attention import IMAGE_TO_TEXT, AttentionRequest, ForwardOptions
from seg4diff_jax.models.conditioning import TextConditioning
from seg4diff_jax.models.sd3.model import (
    MMDiT,
    MMDiTConfig,
    patchify,
    sincos_table,
    velocity_at,
)
from seg4diff_jax.models.trunk import attention_at, attentions_at
from tests.reference.attention import explicit_softmax
from tests.reference.mmdit import SMALL, VARIANTS, equal_tail, forward, make_inputs, make_pair, run_torch, tensors_of
from tests.reference.random_weights import relative_error


@functools.partial(jax.jit, static_argnums=(2, 3))
def record_at(model: MMDiT, inputs: dict, block: int, request: AttentionRequest = IMAGE_TO_TEXT):
    return attention_at(model, **inputs, block=block, options=ForwardOptions(request))


@jax.jit
def velocity_of(model: MMDiT, inputs: dict, tokens):
    return velocity_at(model, **inputs, tokens=tokens)


BLOCK = 2
"""Whose maps the losses are on."""


@functools.partial(jax.jit, static_argnames="remat")
def gradient_of(model: MMDiT, inputs: dict, targets: dict[str, np.ndarray], *, remat: bool) -> MMDiT:
    """Of a loss on the velocity, and on scores and probabilities as far as their targets are not zero."""

    def loss(model: MMDiT):
        velocity, records = model(**inputs, capture=(BLOCK,), options=ForwardOptions(remat=remat))
        maps = sum((getattr(records[BLOCK], part) * target).sum() for part, target in targets.items())
        return maps + (velocity**2).mean()

    return jax.grad(loss)(model)


def targets_of(model: MMDiT, part: str) -> dict[str, np.ndarray]:
    """Noise for one part of a record of 24 image and 12 text tokens; zeros for the other."""
    noise = np.random.default_rng(1).standard_normal((2, model.config.num_attention_heads, 24, 12)).astype(np.float32)
    return {name: noise * np.float32(name == part) for name in ("scores", "probs")}


QUADRANTS = ("image_to_text", "text_to_image", "image_to_image", "text_to_text")
EVERYTHING = AttentionRequest(quadrants=QUADRANTS, qkv=True, text_tokens=(0, None))
SIZE = 12, 16
"""Of the latents, where a test says no other: 48 image tokens."""
RUNS = pytest.mark.parametrize("variant", ["sd3", "scattered dual attention"], indirect=True)
"""For what depends on a model's runs of like blocks alone: one run of all, and one of each."""


@pytest.fixture(scope="module", params=VARIANTS)
def variant(request) -> str:
    return request.param


@pytest.fixture(scope="module")
def pair(variant):
    return make_pair(VARIANTS[variant])


@pytest.fixture(scope="module")
def inputs(variant) -> dict:
    return make_inputs(VARIANTS[variant], SIZE)


@pytest.fixture(scope="module")
def everything(pair, inputs) -> tuple:
    """Velocity, and records of all blocks with all that can be asked for: what other passes are compared with."""
    _, ours = pair
    return forward(ours, inputs, tuple(range(ours.depth)), EVERYTHING)


@pytest.mark.parametrize(("size", "text"), [((8, 20), 12), ((28, 6), 5)])
def test_velocity_equals_diffusers(pair, variant, size, text):
    theirs, ours = pair
    inputs = make_inputs(VARIANTS[variant], size, text)
    with torch.no_grad():
        expected = run_torch(theirs, inputs)
    velocity, records = forward(ours, inputs)
    assert records == {}
    assert relative_error(velocity, expected) <= 1e-5


def test_velocity_of_some_tokens_equals_diffusers_given_those_tokens_alone(pair, variant):
    theirs, ours = pair
    inputs = make_inputs(VARIANTS[variant])
    tokens = np.stack([np.random.default_rng(image).permutation(64)[:20] for image in range(2)])
    given = tensors_of(inputs)
    with torch.no_grad():
        hidden = theirs.pos_embed(given["latents"].permute(0, 3, 1, 2))[[[0], [1]], tokens]
        conditioning = theirs.time_text_embed(given["timesteps"], given["pooled"])
        context = theirs.context_embedder(given["context"])
        for block in theirs.transformer_blocks:
            context, hidden = block(hidden_states=hidden, encoder_hidden_states=context, temb=conditioning)
        expected = theirs.proj_out(theirs.norm_out(hidden, conditioning))
    found = velocity_of(ours, inputs, tokens)
    assert relative_error(found, expected) <= 1e-5


def test_velocity_of_all_tokens_is_the_velocity_in_patches():
    _, ours = make_pair(SMALL)
    inputs = make_inputs(SMALL, (8, 20))
    whole, _ = forward(ours, inputs)
    order = np.random.default_rng(0).permutation(40)[None].repeat(2, axis=0)
    found = velocity_of(ours, inputs, order)
    np.testing.assert_allclose(found, np.asarray(patchify(whole, 2))[:, order[0]], atol=2e-5)


def test_every_map_of_every_block_equals_an_explicit_softmax(pair, inputs, everything):
    theirs, ours = pair
    processors = explicit_softmax(theirs)
    with torch.no_grad():
        velocity_expected = run_torch(theirs, inputs)
    velocity, records = everything
    assert relative_error(velocity, velocity_expected) <= 1e-5
    assert list(records) == list(range(ours.depth))
    tokens = {"image": slice(0, 48), "text": slice(48, None)}
    for block, expected in enumerate(processors):
        for name in "qkv":
            joint = getattr(records[block], name)
            assert relative_error(joint, getattr(expected, name).transpose(1, 2)) <= 1e-5
        for quadrant in QUADRANTS:
            rows, columns = (tokens[stream] for stream in quadrant.split("_to_"))
            ours_map = getattr(records[block], quadrant)
            assert relative_error(ours_map.scores, expected.scores[:, :, rows, columns]) <= 1e-5
            assert relative_error(ours_map.probs, expected.probs[:, :, rows, columns]) <= 1e-5


@RUNS
def test_records_do_not_depend_on_which_other_blocks_are_captured(pair, inputs, everything):
    _, ours = pair
    for capture in [(0,), (1, 2), (ours.depth - 1, 0)]:
        _, records = forward(ours, inputs, capture)
        assert set(records) == set(capture)
        for block in capture:
            np.testing.assert_allclose(records[block].probs, everything[1][block].probs, atol=1e-6)


def test_attention_at_returns_the_record_of_a_whole_forward_pass(pair, inputs, everything):
    _, ours = pair
    _, records = everything
    for block in range(ours.depth):
        record = record_at(ours, inputs, block, EVERYTHING)
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=2e-5), record, records[block])


@RUNS
def test_records_of_several_blocks_come_from_one_pass_that_ends_in_the_last(pair, inputs, everything, monkeypatch):
    _, ours = pair
    shallow = nnx.clone(ours)
    monkeypatch.setattr(MMDiT, "velocity", None)  # whole models have an output head too: it must not be called
    for blocks in [(0, 2), (2, 0, 1), range(ours.depth), [1]]:
        records = jax.jit(lambda x, blocks=blocks: attentions_at(shallow, **x, blocks=blocks))(inputs)
        assert set(records) == set(blocks)
        for block, record in records.items():
            for part in ("scores", "probs"):
                expected = getattr(everything[1][block], part)
                np.testing.assert_allclose(getattr(record, part), expected, atol=2e-5)


@pytest.mark.parametrize("earlier", [(), (0,), (0, 1)])
def test_attention_at_needs_no_parameter_after_q_and_k_of_its_last_block(pair, variant, earlier):
    _, ours = pair
    inputs = make_inputs(VARIANTS[variant])
    block = 2
    records = lambda m, x: attentions_at(m, **x, blocks=(*earlier, block)) if earlier else attention_at(m, **x, block=2)
    jaxpr = jax.make_jaxpr(lambda m, x: jax.tree.map(lambda leaf: leaf, records(m, x)))(ours, inputs)
    used, _ = jax.interpreters.partial_eval.dce_jaxpr(jaxpr.jaxpr, [True] * len(jaxpr.out_avals))
    matmuls = [eqn for eqn in used.eqns if eqn.primitive.name == "dot_general"]
    # Outside the scan over earlier blocks: time (2), pooled (2), context, both modulations, q and k of both streams,
    # the normaliser's scores and the map's own.
    assert len(matmuls) == 5 + 2 + 4 + 2
    shallow = abstract(lambda rngs: MMDiT(ours.config, depth=block + 1, rngs=rngs))
    assert not hasattr(shallow, "proj_out")
    shapes = parameter_shapes(shallow)
    assert f"blocks.{block}.image.attention.q.kernel" in shapes
    assert f"blocks.{block + 1}.image.attention.q.kernel" not in shapes


def test_equal_context_tokens_computed_once_change_nothing(pair, variant):
    _, ours = pair
    full, once = equal_tail(make_inputs(VARIANTS[variant], SIZE), 5)
    every = tuple(range(ours.depth))
    (velocity, records), (velocity_once, records_once) = (forward(ours, x, every, EVERYTHING) for x in (full, once))
    assert relative_error(velocity_once, velocity) <= 1e-5
    for mine, expected in zip(jax.tree.leaves(records_once), jax.tree.leaves(records), strict=True):
        assert mine.shape == expected.shape
        assert relative_error(mine, expected) <= 1e-5
    at_block = record_at(ours, once, 1, EVERYTHING)
    for mine, expected in zip(jax.tree.leaves(at_block), jax.tree.leaves(records[1]), strict=True):
        assert relative_error(mine, expected) <= 1e-5


def test_gradients_depend_neither_on_how_equal_tokens_are_computed_nor_on_remat(pair, variant):
    _, ours = pair
    full, once = equal_tail(make_inputs(VARIANTS[variant], (8, 12), text=12), 7)
    targets = targets_of(ours, "probs")
    gradient = lambda inputs, remat: jax.device_get(jax.tree.leaves(gradient_of(ours, inputs, targets, remat=remat)))
    plain, once = gradient(full, False), gradient(once, True)
    # Without q/k norm a softmax does not see the keys' biases: their gradients are rounding of the others.
    rounding = 1e-7 * max(float(np.abs(leaf).max()) for leaf in plain)
    for mine, expected in zip(once, plain, strict=True):
        np.testing.assert_allclose(mine, expected, atol=2e-5 * float(np.abs(expected).max()) + rounding)


@pytest.mark.parametrize("equal", [0, 10])
def test_a_count_of_equal_tokens_beyond_the_context_is_refused(equal):
    given = make_inputs(SMALL)["conditioning"]
    with pytest.raises(ValueError, match=f"equal is {equal}; expected 1 to the context's 9 tokens"):
        TextConditioning.from_full(given.context, given.pooled, equal)
    with pytest.raises(ValueError, match="last_token_count is 0; expected a whole number, at least 1"):
        TextConditioning(given.context, given.pooled, 0)


def test_the_full_context_shows_every_token():
    full, once = equal_tail(make_inputs(SMALL), 4)
    assert once["conditioning"].context.shape[1] == 6
    np.testing.assert_array_equal(once["conditioning"].full_context, full["conditioning"].context)


@RUNS
def test_averaged_heads_of_some_text_tokens_are_the_mean_of_the_heads_there(pair, inputs, everything):
    _, ours = pair
    kept = everything[1][1]
    averaged = record_at(ours, inputs, 1, AttentionRequest(QUADRANTS, mean_heads=True, text_tokens=(2, 7)))
    shown = {"image": slice(None), "text": slice(2, 7)}
    for quadrant in QUADRANTS:
        rows, columns = (shown[stream] for stream in quadrant.split("_to_"))
        found, expected = getattr(averaged, quadrant), getattr(kept, quadrant)
        of_all = lambda heads, rows=rows, columns=columns: np.asarray(heads)[:, :, rows, columns].mean(1)
        np.testing.assert_allclose(found.probs, of_all(expected.probs), rtol=1e-5, atol=1e-7)
        np.testing.assert_allclose(found.scores, of_all(expected.scores), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("part", ["scores", "probs"])
def test_gradients_of_a_loss_on_the_maps_equal_autograd(pair, variant, part):
    theirs, ours = pair
    inputs = make_inputs(VARIANTS[variant], (8, 12), text=12)
    targets = targets_of(ours, part)
    gradients = gradient_of(ours, inputs, targets, remat=False)
    found = by_layer(gradients)
    expected, moved = (autograd(theirs, ours.config, inputs, targets, part, by) for by in (0, 2**-24))
    scale = max(np.abs(gradient).max() for gradient in expected.values())
    for name, gradient in expected.items():
        error, change = (np.abs(other[name] - gradient).max() for other in (found, moved))
        assert error <= max(change, sees_nothing(name, variant) * 2**-24 * scale), name


def autograd(
    theirs: SD3Transformer2DModel, config: MMDiTConfig, inputs: dict, targets: dict, part: str, by: float
) -> dict[str, np.ndarray]:
    """Gradients in float64 of weights and times that are moved by a share of themselves, up or down.

    Those of weights that are moved by 2^-24, half a step of fp32, differ by more than a sum in fp32 may be wrong: on an
    AMD EPYC ours are up to 0.46 of the difference from those of the weights as they are, PyTorch's up to 0.22.
    """
    theirs, draw = copy.deepcopy(theirs).double(), torch.Generator().manual_seed(0)
    with torch.no_grad():
        for weights in theirs.parameters():
            weights.mul_(1 + by * (2 * torch.randint(2, weights.shape, generator=draw) - 1))
    processors = explicit_softmax(theirs)
    theirs.zero_grad()
    times = inputs["timesteps"] * np.float32(1 + 2 * by)  # diffusers computes its cosines in fp32 whatever is asked for
    velocity = run_torch(theirs, inputs | {"timesteps": times})
    maps = getattr(processors[BLOCK], part)[:, :, :24, 24:]
    ((maps * torch.from_numpy(targets[part])).sum() + (velocity**2).mean()).backward()
    tensors = {name: torch.zeros_like(p) if p.grad is None else p.grad for name, p in theirs.named_parameters()}
    tensors = {name: tensor.numpy() for name, tensor in (tensors | dict(theirs.named_buffers())).items()}
    make = lambda rngs: MMDiT(config, rngs=rngs)
    return by_layer(from_state_dict(abstract(make), table.diffusers(config), tensors))


def by_layer(model: MMDiT) -> dict[str, np.ndarray]:
    """Every parameter by its per-layer name; the positional table, which is not trained, left out."""
    return {name: array for name, array in layer_arrays(model).items() if not name.startswith("pos_embed")}


def sees_nothing(name: str, variant: str) -> bool:
    """Whether a softmax does not see a parameter: one vector added to all keys changes nothing.

    In float64 its gradient is 1e-17 of the largest, in fp32 what rounding leaves of it, here 1.6e-8 of the largest.
    """
    return name.endswith("dual_attention.k.bias") and "qk_norm" not in VARIANTS[variant]


def test_the_program_does_not_grow_with_depth():
    def equations(layers: int) -> int:
        config = MMDiTConfig.from_json(SMALL | {"num_layers": layers})
        model = abstract(lambda rngs: MMDiT(config, rngs=rngs))
        inputs = make_inputs(SMALL)
        return len(str(jax.make_jaxpr(lambda m, x: m(**x, capture=(2,)))(model, inputs)).splitlines())

    assert equations(12) == equations(30)


WIDE = SMALL | {
    "num_layers": 6,
    "num_attention_heads": 16,
    "attention_head_dim": 32,
    "caption_projection_dim": 512,
}
"""Parameters of a block take 27 MB, far more than the states of a few tokens."""


@pytest.mark.parametrize("capture", [(2,), (0, 3)])
@pytest.mark.parametrize("of", ["velocity", "gradients with remat"])
def test_captured_blocks_need_no_more_copies_of_a_blocks_parameters(capture, of):
    """A scan of one captured block, between others, held another copy, in the backward pass too."""
    config = MMDiTConfig.from_json(WIDE)
    model = abstract(lambda rngs: MMDiT(config, rngs=rngs))
    inputs = jax.eval_shape(lambda: make_inputs(WIDE, (8, 8)))

    def program(captured):
        def loss(latents, model, rest):
            options = ForwardOptions(remat=of != "velocity")
            velocity, records = model(latents, **rest, capture=captured, options=options)
            return (velocity**2).sum() + sum((leaf**2).sum() for leaf in jax.tree.leaves(records))

        return loss if of == "velocity" else jax.grad(loss)

    rest = {name: value for name, value in inputs.items() if name != "latents"}
    plain, capturing = (
        jax.jit(program(captured)).lower(inputs["latents"], model, rest).compile().memory_analysis().temp_size_in_bytes
        for captured in ((), capture)
    )
    assert plain > 20e6
    assert capturing <= 1.1 * plain


@RUNS
def test_maps_under_vmap_equal_maps_of_a_batch(pair, inputs, everything):
    _, ours = pair
    single = lambda x: attention_at(ours, **jax.tree.map(lambda leaf: leaf[None], x), block=1).probs[0]
    mapped = jax.jit(jax.vmap(single))(inputs)
    np.testing.assert_allclose(mapped, everything[1][1].probs, atol=1e-6)


def test_bfloat16_stays_near_float32_and_its_maps_are_exact_softmaxes_in_float32(pair, inputs, everything):
    """Measured over three draws of inputs and all blocks: velocity 0.023, scores 0.040, probabilities 0.045."""
    theirs, ours = pair
    tensors = {name: tensor.numpy() for name, tensor in theirs.state_dict().items()}
    make = lambda rngs: MMDiT(ours.config, dtype=jnp.bfloat16, param_dtype=jnp.bfloat16, rngs=rngs)
    half = from_state_dict(abstract(make), table.diffusers(ours.config), tensors, dtype=jnp.bfloat16)
    request = AttentionRequest(quadrants=("image_to_image", "image_to_text"))
    velocity, records = forward(half, inputs, range(ours.depth), request)
    exact, exact_records = everything
    assert velocity.dtype == jnp.bfloat16
    assert relative_error(velocity.astype(np.float32), np.asarray(exact)) <= 0.03
    for block, record in records.items():
        assert record.probs.dtype == record.scores.dtype == jnp.float32
        assert relative_error(record.scores, exact_records[block].scores) <= 0.05
        assert relative_error(record.probs, exact_records[block].probs) <= 0.06
        both = record.image_to_image, record.image_to_text
        scores, probs = (np.concatenate([getattr(part, name) for part in both], -1) for name in ("scores", "probs"))
        np.testing.assert_allclose(probs, softmax(scores, -1), atol=1e-6)


def test_the_positional_table_is_the_published_one():
    theirs = SD3Transformer2DModel(**SMALL)
    table_expected = theirs.pos_embed.pos_embed.reshape(14, 14, 48)
    assert relative_error(sincos_table(MMDiTConfig.from_json(SMALL)), table_expected) <= 1e-6


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"qk_norm": "layer_norm"}, "qk_norm is 'layer_norm'"),
        ({"caption_projection_dim": 47}, "caption_projection_dim is 47"),
        ({"pos_embed_max_size": None}, "pos_embed_max_size is missing"),
    ],
)
def test_a_variant_that_is_not_implemented_is_refused(change, message):
    with pytest.raises(ValueError, match=message):
        MMDiTConfig.from_json(SMALL | change)


def test_latents_that_do_not_fit_and_blocks_that_do_not_exist_are_refused(pair, variant):
    _, ours = pair
    with pytest.raises(ValueError, match="latents are 15 x 16; sides must be multiples of 2, up to 28"):
        ours(**make_inputs(VARIANTS[variant], (15, 16)))
    with pytest.raises(ValueError, match="latents are 30 x 16"):
        ours(**make_inputs(VARIANTS[variant], (30, 16)))
    with pytest.raises(ValueError, match=r"cannot capture blocks \[40\]"):
        ours(**make_inputs(VARIANTS[variant]), capture=(40,))
    with pytest.raises(ValueError, match="cannot capture block 40"):
        attention_at(ours, **make_inputs(VARIANTS[variant]), block=40)
    with pytest.raises(ValueError, match=r"cannot capture blocks \[-1, 40\]: the model holds blocks 0\.\."):
        attentions_at(ours, **make_inputs(VARIANTS[variant]), blocks=(-1, 0, 40))
    with pytest.raises(ValueError, match="no block is named"):
        attentions_at(ours, **make_inputs(VARIANTS[variant]), blocks=())
    shallow = abstract(lambda rngs: MMDiT(ours.config, depth=2, rngs=rngs))
    with pytest.raises(ValueError, match=r"holds blocks 0..1 of \d and has no output head"):
        shallow(**make_inputs(VARIANTS[variant]))


def test_a_segment_of_the_text_is_asked_for_by_its_name():
    _, ours = make_pair(SMALL)
    full, once = equal_tail(make_inputs(SMALL), 4)
    named = lambda inputs: {
        **inputs,
        "conditioning": replace(inputs["conditioning"], segments=(("clip", 5), ("t5", 4))),
    }
    for name, numbers in (("clip", (0, 5)), ("t5", (5, None))):
        by_name, by_number = (AttentionRequest(text_tokens=tokens) for tokens in (name, numbers))
        expected = record_at(ours, full, 1, by_number)
        for inputs in (full, once):
            found = record_at(ours, named(inputs), 1, by_name)
            assert found.probs.shape == expected.probs.shape
            np.testing.assert_allclose(found.probs, expected.probs, atol=1e-6)
    with pytest.raises(ValueError, match="no segment called 'pad': there are clip, t5; name one"):
        record_at(ours, named(full), 1, AttentionRequest(text_tokens="pad"))
    with pytest.raises(ValueError, match="no segment called 'clip': it names none"):
        record_at(ours, {**full, "conditioning": replace(full["conditioning"], segments=())}, 1)
