"""Blurred attention is that of an explicit softmax in PyTorch; skipped blocks are those that diffusers skips."""

from __future__ import annotations

from dataclasses import replace

import jax
import jax.numpy as jnp
import jaxtyping
import numpy as np
import pytest
import torch
from scipy import ndimage

from seg4diff_jax.convert.assemble import abstract, from_state_dict
from seg4diff_jax.convert.tables import mmdit as table
from seg4diff_jax.models.attention import AttentionRequest, ForwardOptions
from seg4diff_jax.models.kernels import Kernel
from seg4diff_jax.models.perturbation import Blur, Perturbation, Perturbing, skip_layers
from seg4diff_jax.models.sd3.config import MMDiTConfig
from seg4diff_jax.models.sd3.model import MMDiT
from seg4diff_jax.models.trunk import attentions_at
from tests.reference.attention import BlurredSoftmax, explicit_softmax
from tests.reference.largest_array import largest_array
from tests.reference.mmdit import VARIANTS, equal_tail, make_inputs, make_pair, run_torch, tensors_of
from tests.reference.random_weights import relative_error

SIZE, GRID = (16, 12), (8, 6)
ROWS = [True, False, True]
TEXT, TAIL = 9, 4
MODES = {"symmetric": "reflect", "reflect": "mirror"}
"""SciPy's names of the paddings."""


@pytest.fixture(scope="module")
def pairs():
    made = {}

    def pair(variant: str):
        if variant not in made:
            made[variant] = make_pair(VARIANTS[variant])
        return made[variant]

    return pair


def perturbed(model: MMDiT, inputs: dict, blocks: tuple[int, ...], change, rows=ROWS, **options) -> jax.Array:
    perturbing = Perturbing(change, jnp.outer(of_blocks(model, blocks), jnp.array(rows)), GRID)
    options = ForwardOptions(None, perturbing=perturbing, **options)
    return jax.jit(lambda model, inputs: model(**inputs, options=options)[0])(model, inputs)


def of_blocks(model: MMDiT, blocks: tuple[int, ...]) -> jax.Array:
    return jnp.asarray(Perturbation(blocks).of_blocks(model.depth))


# ---- the blur -------------------------------------------------------------------------------------------------------


def test_the_papers_taps_are_nearly_a_box():
    np.testing.assert_allclose(Blur().weights(), [0.19754, 0.20123, 0.20247, 0.20123, 0.19754], atol=5e-6)
    assert len(Blur(over="image", sigma=1.0).weights()) == 7, "6 sigma, made odd, as in SEG"


@pytest.mark.parametrize("pad", MODES)
@pytest.mark.parametrize(("sigma", "kernel", "length"), [(9.0, 5, 77), (1.5, 7, 12), (2.0, 9, 5)])
def test_probabilities_times_the_matrix_are_scipys_correlation(pad, sigma, kernel, length):
    blur = Blur(sigma, kernel, pad)
    probs = np.random.default_rng(0).random((3, length))
    expected = ndimage.correlate1d(probs, blur.weights(), mode=MODES[pad])
    np.testing.assert_allclose(probs @ blur.matrix(length), expected, atol=1e-12)


def test_symmetric_padding_keeps_each_rows_mass_and_reflect_takes_it_from_the_ends():
    np.testing.assert_allclose(Blur().matrix(77).sum(axis=1), 1, atol=1e-12)
    given = Blur(pad="reflect").matrix(77).sum(axis=1)
    np.testing.assert_allclose(given[:4], [0.601, 1.201, 1.198, 1], atol=1e-3)
    np.testing.assert_allclose(given[::-1], given, atol=1e-12)


# ---- the same as an explicit softmax --------------------------------------------------------------------------------


@pytest.mark.parametrize("pad", MODES)
@pytest.mark.parametrize(
    ("variant", "over", "text_tokens"),
    [
        ("sd3", "text", (0, 5)),
        ("sd3", "text", (0, None)),
        ("sd3.5-medium", "text", (2, 9)),
        ("sd3", "image", (0, 5)),
        ("sd3.5-medium", "image", (1, None)),
    ],
)
def test_a_blur_is_that_of_probabilities_written_out(pairs, variant, over, text_tokens, pad):
    """In some rows and blocks alone; of text whose last token stands for several, as of tokens one by one."""
    theirs, ours = pairs(variant)
    blocks, blur = (1, 3), Blur(1.5, 5, pad, over, text_tokens)
    full, once = equal_tail(make_inputs(VARIANTS[variant], SIZE, TEXT, batch=3), TAIL)
    explicit_softmax(theirs)
    plain = run_torch(theirs, full).detach().numpy()
    columns = (text_tokens[0], text_tokens[1] or TEXT)
    for block in blocks:
        theirs.transformer_blocks[block].attn.set_processor(BlurredSoftmax(1.5, 5, pad, over, columns, ROWS, GRID))
    expected = run_torch(theirs, full).detach().numpy()
    for inputs in (full, once):
        found = np.asarray(perturbed(ours, inputs, blocks, blur))
        assert relative_error(found, expected) <= 1e-5
        np.testing.assert_allclose(found[1], plain[1], atol=1e-4)
    assert relative_error(plain[ROWS], expected[ROWS]) > 3e-3, "the blur changes the rows that it is of"


def test_every_kernel_blurs_alike(pairs):
    _, ours = pairs("sd3")
    _, inputs = equal_tail(make_inputs(VARIANTS["sd3"], SIZE, TEXT, batch=3), TAIL)
    for blur in (Blur(1.5, text_tokens="clip"), Blur(1.5, text_tokens=(0, None)), Blur(1.5, over="image")):
        expected = perturbed(ours, inputs, (1,), blur)
        for kernel in (Kernel("splash", interpret=True), Kernel("xla", query_chunk=7)):
            found = perturbed(ours, inputs, (1,), blur, kernel=kernel)
            assert relative_error(np.asarray(found), np.asarray(expected)) <= 1e-5


def test_no_rows_are_the_plain_model(pairs):
    _, ours = pairs("sd3")
    inputs = make_inputs(VARIANTS["sd3"], SIZE, TEXT, batch=3)
    expected = np.asarray(jax.jit(lambda model: model(**inputs)[0])(ours))
    for change in (Blur(), Blur(over="image"), "skip"):
        found = perturbed(ours, inputs, (0, 2), change, rows=[False] * 3)
        assert relative_error(np.asarray(found), expected) <= 1e-6


def test_records_show_the_attention_before_it_is_blurred_and_later_blocks_feel_it(pairs):
    _, ours = pairs("sd3")
    inputs = make_inputs(VARIANTS["sd3"], SIZE, TEXT, batch=3)
    request = AttentionRequest(quadrants=("image_to_text", "text_to_image"))
    for change in (Blur(3.0), Blur(3.0, over="image"), "skip"):
        options = ForwardOptions(
            request, perturbing=Perturbing(change, jnp.outer(of_blocks(ours, (1,)), jnp.array(ROWS)), GRID)
        )
        look = lambda options: jax.jit(lambda model: attentions_at(model, **inputs, blocks=(0, 1, 2), options=options))(
            ours
        )
        plain, found = look(replace(options, perturbing=None)), look(options)
        for block in (0, 1):
            for quadrant in request.quadrants:
                expected = getattr(plain[block], quadrant).probs
                np.testing.assert_allclose(getattr(found[block], quadrant).probs, expected, atol=1e-5)
        moved = np.abs(np.asarray(found[2].probs - plain[2].probs)).max(axis=(1, 2, 3))
        assert (moved > 1e-4).tolist() == ROWS
        _, whole = jax.jit(lambda model, o=options: model(**inputs, capture=(0, 1, 2), options=o))(ours)
        np.testing.assert_allclose(whole[2].probs, found[2].probs, atol=1e-5)


@pytest.mark.parametrize("change", [Blur(text_tokens=(0, None)), Blur(over="image")])
def test_nothing_has_as_many_elements_as_pairs_of_image_tokens(change):
    side = 32
    config = MMDiTConfig.from_json(VARIANTS["sd3"] | {"pos_embed_max_size": side})
    model = abstract(lambda rngs: MMDiT(config, rngs=rngs))
    inputs = make_inputs(VARIANTS["sd3"], (2 * side, 2 * side), TEXT, batch=1)
    perturbing = Perturbing(change, of_blocks(model, (1,))[:, None], (side, side))
    options = ForwardOptions(None, Kernel("xla", query_chunk=8), perturbing=perturbing)
    assert largest_array(lambda model: model(**inputs, options=options)[0], model) < side**4


@pytest.mark.parametrize("remat", [False, True])
@pytest.mark.parametrize("over", ["text", "image"])
def test_gradients_through_a_blur_are_those_of_pytorch(pairs, over, remat):
    theirs, ours = pairs("sd3")
    inputs, block = make_inputs(VARIANTS["sd3"], SIZE, TEXT, batch=3), 1
    explicit_softmax(theirs)
    blurred = BlurredSoftmax(1.5, 5, "symmetric", over, (0, 5), ROWS, GRID)
    theirs.transformer_blocks[block].attn.set_processor(blurred)
    tensors = tensors_of(inputs)
    latents = tensors["latents"].permute(0, 3, 1, 2).requires_grad_()
    made = theirs(
        hidden_states=latents,
        encoder_hidden_states=tensors["context"],
        pooled_projections=tensors["pooled"],
        timestep=tensors["timesteps"],
    ).sample
    (expected,) = torch.autograd.grad(made.square().sum(), latents)
    blur = Blur(1.5, 5, over=over, text_tokens=(0, 5))
    perturbing = Perturbing(blur, jnp.outer(of_blocks(ours, (block,)), jnp.array(ROWS)), GRID)
    options = ForwardOptions(None, remat=remat, perturbing=perturbing)
    loss = lambda latents: jnp.square(ours(**inputs | {"latents": latents}, options=options)[0]).sum()
    found = np.asarray(jax.jit(jax.grad(loss))(inputs["latents"]))
    assert relative_error(found, expected.permute(0, 2, 3, 1).numpy()) <= 1e-5


def test_bfloat16_blurs_as_closely_as_it_computes(pairs):
    theirs, ours = pairs("sd3")
    inputs = make_inputs(VARIANTS["sd3"], SIZE, TEXT, batch=3)
    make = lambda rngs: MMDiT(ours.config, dtype=jnp.bfloat16, param_dtype=jnp.bfloat16, rngs=rngs)
    tensors = {name: tensor.numpy() for name, tensor in theirs.state_dict().items()}
    half = from_state_dict(abstract(make), table.diffusers(ours.config), tensors, dtype=jnp.bfloat16)
    for over in ("text", "image"):
        blur = Blur(1.5, over=over)
        exact, found = (np.asarray(perturbed(model, inputs, (1,), blur), np.float32) for model in (ours, half))
        plain, rounded = (
            np.asarray(perturbed(model, inputs, (1,), blur, rows=[False] * 3), np.float32) for model in (ours, half)
        )
        assert relative_error(found, exact) <= 1.5 * relative_error(rounded, plain)


# ---- skipped blocks -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("variant", VARIANTS)
def test_skipped_blocks_are_those_of_diffusers(pairs, variant):
    theirs, ours = pairs(variant)
    inputs, blocks = make_inputs(VARIANTS[variant], SIZE, TEXT, batch=3), (0, 2)
    explicit_softmax(theirs)
    tensors = tensors_of(inputs)
    run = lambda skip: theirs(
        hidden_states=tensors["latents"].permute(0, 3, 1, 2),
        encoder_hidden_states=tensors["context"],
        pooled_projections=tensors["pooled"],
        timestep=tensors["timesteps"],
        skip_layers=skip,
    ).sample.permute(0, 2, 3, 1)
    with torch.no_grad():
        skipped, plain = run(list(blocks)).numpy(), run(None).numpy()
    expected = np.where(np.array(ROWS)[:, None, None, None], skipped, plain)
    assert relative_error(np.asarray(perturbed(ours, inputs, blocks, "skip")), expected) <= 1e-5


def test_skip_layer_guidance_is_in_the_steps_of_diffusers():
    """In diffusers a step is skipped if its number from the start lies between 0.01 and 0.2 of all, exclusive."""
    assert skip_layers(28) == Perturbation((7, 8, 9), "skip", (27, 26, 25, 24, 23))
    assert skip_layers(10, (1,), start=0.05, stop=0.45).steps == (9, 8, 7, 6)
    with pytest.raises(ValueError, match=r"none of 4 steps lies between 0\.01 and 0\.2 of the run"):
        skip_layers(4)


# ---- what is wrong --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"sigma": -1.0}, "sigma is -1.0; expected a number of tokens, at least 0"),
        ({"sigma": float("inf")}, "sigma is inf"),
        ({"kernel": 4}, "kernel is 4; expected an odd number of taps"),
        ({"pad": "edge"}, "pad is 'edge'; there are symmetric, reflect"),
        ({"over": "heads"}, "over is 'heads'; there are text, image"),
        ({"sigma": True}, "sigma is True"),
        ({"sigma": 1e12, "over": "image"}, "sigma is 1000000000000.0; expected at most 1000, or name a kernel"),
        ({"text_tokens": (-30, 5)}, r"text_tokens is \(-30, 5\); expected 0 <= first < last"),
        ({"text_tokens": (5, 2)}, r"text_tokens is \(5, 2\); expected 0 <= first < last"),
    ],
)
def test_a_blur_that_means_nothing_is_refused(options, message, monkeypatch):
    monkeypatch.setattr(jaxtyping.config, "jaxtyping_disable", True)  # as for users: types are checked in tests only
    with pytest.raises(ValueError, match=message):
        Blur(**options)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"blocks": ()}, r"blocks is \(\); expected the numbers of one block or more"),
        ({"blocks": (1, 1)}, "each once"),
        ({"blocks": (3.5,)}, r"blocks is \(3\.5,\); expected the numbers"),
        ({"blocks": (True,)}, r"blocks is \(True,\); expected the numbers"),
        ({"blocks": "3"}, r"blocks is \('3',\); expected the numbers"),
        ({"blocks": 3}, "blocks is 3; expected a list of numbers"),
        ({"blocks": (1,), "steps": (1.5,)}, r"steps is \(1\.5,\); expected the numbers"),
        ({"blocks": (1,), "steps": 2}, "steps is 2; expected a list of numbers"),
        ({"blocks": (1,), "change": "drop"}, "change is 'drop'; expected a Blur or 'skip'"),
        ({"blocks": (1,), "steps": ()}, r"steps is \(\); expected the numbers of one step or more"),
        ({"blocks": (1,), "half": "left"}, "half is 'left'; there are both, prompt, negative"),
    ],
)
def test_a_perturbation_that_means_nothing_is_refused(options, message, monkeypatch):
    monkeypatch.setattr(jaxtyping.config, "jaxtyping_disable", True)  # as for users: types are checked in tests only
    with pytest.raises(ValueError, match=message):
        Perturbation(**options)


def test_blocks_and_segments_that_there_are_not_are_refused(pairs):
    _, ours = pairs("sd3")
    inputs = make_inputs(VARIANTS["sd3"], SIZE, TEXT, batch=3)
    with pytest.raises(ValueError, match=r"cannot perturb block 4: the model holds blocks 0\.\.3"):
        perturbed(ours, inputs, (4,), Blur())
    with pytest.raises(ValueError, match="no segment called 't5': there are clip"):
        perturbed(ours, inputs, (1,), Blur(text_tokens="t5"))
    with pytest.raises(ValueError, match=r"text_tokens is \(9, None\); this text has 9 tokens"):
        perturbed(ours, inputs, (1,), Blur(text_tokens=(9, None)))
