"""CLIP's text tower equals transformers' CLIPTextModelWithProjection, and loads from either kind of checkpoint."""

from __future__ import annotations

import gc

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
import transformers
from diffusers.loaders.single_file_utils import create_diffusers_clip_model_from_ldm
from transformers import CLIPTextModelWithProjection

from seg4diff_jax.convert.assemble import abstract, from_state_dict
from seg4diff_jax.convert.names import NameTableError, assign_back, parameter_shapes
from seg4diff_jax.convert.tables import clip as table
from seg4diff_jax.models.clip import CLIPText, CLIPTextConfig
from tests.reference.random_weights import randomize_, relative_error
from tests.reference.saved import load_saved

START, END, LEGACY = 97, 98, 2
SMALL = {
    "vocab_size": 99,
    "hidden_size": 32,
    "intermediate_size": 72,
    "projection_dim": 24,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "bos_token_id": START,
}
SD3 = {"vocab_size": 49408, "max_position_embeddings": 77, "eos_token_id": LEGACY, "bos_token_id": 0}
CLIP_L = SD3 | {
    "hidden_size": 768,
    "intermediate_size": 3072,
    "num_hidden_layers": 12,
    "num_attention_heads": 12,
    "projection_dim": 768,
    "hidden_act": "quick_gelu",
}
BIG_G = SD3 | {
    "hidden_size": 1280,
    "intermediate_size": 5120,
    "num_hidden_layers": 32,
    "num_attention_heads": 20,
    "projection_dim": 1280,
    "hidden_act": "gelu",
}


def make_theirs(config: dict) -> CLIPTextModelWithProjection:
    return randomize_(CLIPTextModelWithProjection(transformers.CLIPTextConfig(**config)))


def state_of(theirs: torch.nn.Module) -> dict[str, np.ndarray]:
    return {name: tensor.numpy() for name, tensor in theirs.state_dict().items()}


def make_ours(config: dict, tensors: dict[str, np.ndarray], rules=table.diffusers, **options) -> CLIPText:
    parsed = CLIPTextConfig.from_json(config)
    return from_state_dict(abstract(lambda rngs: CLIPText(parsed, rngs=rngs, **options)), rules(parsed), tensors)


def make_pair(**changes) -> tuple[CLIPTextModelWithProjection, CLIPText]:
    theirs = make_theirs(SMALL | changes)
    return theirs, make_ours(theirs.config.to_dict(), state_of(theirs))


def make_ids(tokens: int, pad: int, batch: int = 3, start: int = START, end: int = END) -> np.ndarray:
    """Start, words, end, padding: texts of different lengths, the last one filling its row."""
    rng = np.random.default_rng(tokens)
    ids = np.full((batch, tokens), pad)
    for row, length in zip(ids, np.linspace(min(2, tokens), tokens, batch).astype(int), strict=True):
        row[:length] = rng.integers(3, start, length)
        row[0] = start
        row[length - 1 : length] = end
    return ids


def run_theirs(theirs: CLIPTextModelWithProjection, ids: np.ndarray) -> tuple[np.ndarray, ...]:
    with torch.no_grad():
        out = theirs(torch.tensor(ids), output_hidden_states=True)
    return tuple(x.float().numpy() for x in (out.hidden_states[-2], out.last_hidden_state, out.text_embeds))


def errors(ours: CLIPText, ids: np.ndarray, expected: tuple[np.ndarray, ...]) -> list[float]:
    return [
        relative_error(a, b) for a, b in zip(jax.jit(CLIPText.__call__)(ours, jnp.asarray(ids)), expected, strict=True)
    ]


def test_the_reference_configs_are_read_whole():
    for config, width, layers in ((CLIP_L, 768, 12), (BIG_G, 1280, 32)):
        parsed = CLIPTextConfig.from_json(config | {"model_type": "clip_text_model", "pad_token_id": 1})
        assert (parsed.hidden_size, parsed.num_hidden_layers, parsed.eos_token_id) == (width, layers, LEGACY)
        assert parsed.hidden_act == config["hidden_act"]


def test_absent_keys_take_the_defaults_of_transformers():
    theirs = transformers.CLIPTextConfig()
    for name, value in vars(CLIPTextConfig.from_json({})).items():
        assert value == getattr(theirs, name), name


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("hidden_act", "gelu_new"),
        ("eos_token_id", [2, 49407]),
        ("projection_dim", None),
        ("hidden_size", 33),
    ],
)
def test_a_value_that_is_not_implemented_is_refused_by_name(name, value):
    with pytest.raises(ValueError, match=name):
        CLIPTextConfig.from_json(SMALL | {name: value})


@pytest.mark.parametrize("activation", ["quick_gelu", "gelu"])
@pytest.mark.parametrize("eos", [LEGACY, END])
def test_every_output_equals_transformers(activation, eos):
    theirs, ours = make_pair(hidden_act=activation, eos_token_id=eos)
    for tokens in (1, 2, 13, 77):
        for pad in (0, END):
            ids = make_ids(tokens, pad)
            assert max(errors(ours, ids, run_theirs(theirs, ids))) <= 1e-5, (tokens, pad)


def test_a_single_layer_has_the_embeddings_as_penultimate_state():
    theirs, ours = make_pair(num_hidden_layers=1)
    ids = make_ids(13, END)
    assert max(errors(ours, ids, run_theirs(theirs, ids))) <= 1e-5
    np.testing.assert_array_equal(ours(jnp.asarray(ids)).penultimate, ours.embed(jnp.asarray(ids)))


def project(ours: CLIPText, last: jax.Array, positions: list[int]) -> np.ndarray:
    return np.asarray(last)[np.arange(len(positions)), positions] @ np.asarray(ours.projection.kernel[...])


def test_with_the_legacy_end_token_the_pooled_token_is_the_argmax_of_the_ids():
    theirs, ours = make_pair(eos_token_id=LEGACY)
    ids = np.array([[START, 5, LEGACY, 98, 7, 98], [START, LEGACY, 5, 6, 7, 8]])
    out = ours(jnp.asarray(ids))
    np.testing.assert_allclose(out.pooled, project(ours, out.last, [3, 0]), rtol=1e-5, atol=1e-6)
    assert max(errors(ours, ids, run_theirs(theirs, ids))) <= 1e-5


def test_otherwise_the_pooled_token_is_the_first_end_token_or_the_first_of_all():
    theirs, ours = make_pair(eos_token_id=50)
    ids = np.array([[START, 5, 50, 98, 50, 98], [START, 51, 5, 6, 7, 8]])
    out = ours(jnp.asarray(ids))
    np.testing.assert_allclose(out.pooled, project(ours, out.last, [2, 0]), rtol=1e-5, atol=1e-6)
    assert max(errors(ours, ids, run_theirs(theirs, ids))) <= 1e-5


def test_a_token_sees_only_itself_and_what_came_before():
    _, ours = make_pair()
    ids = make_ids(13, END)
    changed = ids.copy()
    changed[:, 8:] = 5
    for a, b in zip(ours(jnp.asarray(ids))[:2], ours(jnp.asarray(changed))[:2], strict=True):
        np.testing.assert_array_equal(a[:, :8], b[:, :8])
        assert np.abs(a[:, 8:] - b[:, 8:]).max() > 0.1


def test_a_text_longer_than_the_position_table_is_refused():
    _, ours = make_pair(max_position_embeddings=20)
    with pytest.raises(ValueError, match="21 tokens; this CLIP has positions for 20"):
        ours(jnp.zeros((1, 21), int))


def test_the_program_does_not_grow_with_depth():
    sizes = []
    for layers in (2, 8):
        config = CLIPTextConfig.from_json(SMALL | {"num_hidden_layers": layers})
        model = abstract(lambda rngs, config=config: CLIPText(config, rngs=rngs))
        sizes.append(len(str(jax.make_jaxpr(CLIPText.__call__)(model, jnp.zeros((1, 7), int))).splitlines()))
    assert sizes[0] == sizes[1]


def test_the_penultimate_state_costs_no_copy_of_the_parameters():
    config = CLIPTextConfig.from_json(SMALL | {"hidden_size": 256, "intermediate_size": 1024, "num_hidden_layers": 4})
    model = abstract(lambda rngs: CLIPText(config, rngs=rngs))
    compiled = jax.jit(CLIPText.__call__).lower(model, jnp.zeros((1, 2), int)).compile()
    layer = sum(np.prod(shape) for name, shape in parameter_shapes(model).items() if name.startswith("blocks.0."))
    assert compiled.memory_analysis().temp_size_in_bytes < 4 * 1.5 * layer


@pytest.mark.parametrize(("dtype", "bound"), [(jnp.bfloat16, 2e-2), (jnp.float16, 3e-3)])
@pytest.mark.parametrize("activation", ["quick_gelu", "gelu"])
def test_half_precision_stays_close_to_fp32_and_as_close_as_in_torch(activation, dtype, bound):
    theirs = make_theirs(SMALL | {"hidden_act": activation})
    ids = make_ids(77, END)
    expected = run_theirs(theirs, ids)
    half = make_ours(theirs.config.to_dict(), state_of(theirs), dtype=dtype)
    assert all(out.dtype == dtype for out in half(jnp.asarray(ids)))
    measured = errors(half, ids, expected)
    theirs_half = run_theirs(theirs.to(getattr(torch, jnp.dtype(dtype).name)), ids)
    in_torch = [relative_error(a, b) for a, b in zip(theirs_half, expected, strict=True)]
    assert max(measured) <= bound
    assert max(measured) <= 1.2 * max(in_torch)


def test_the_table_names_every_tensor_that_transformers_saves_and_names_it_back():
    theirs, ours = make_pair()
    back = assign_back(table.diffusers(ours.config), parameter_shapes(ours))
    assert {assignment.source for assignment in back} == set(theirs.state_dict())


def test_stored_position_ids_are_redundant():
    theirs, ours = make_pair()
    tensors = state_of(theirs) | {"text_model.embeddings.position_ids": np.arange(77)[None]}
    again = make_ours(theirs.config.to_dict(), tensors)
    np.testing.assert_array_equal(again.position_embedding.embedding[...], ours.position_embedding.embedding[...])


def test_a_checkpoint_without_projection_is_refused_by_name():
    theirs, _ = make_pair()
    tensors = state_of(theirs)
    del tensors["text_projection.weight"]
    with pytest.raises(NameTableError, match=r"missing tensor text_projection\.weight \[\d+, \d+\]"):
        make_ours(theirs.config.to_dict(), tensors)


def from_single_file(config: dict, letter: str, tensors: dict, folder) -> CLIPTextModelWithProjection:
    """What diffusers makes of the same tensors inside a single file."""
    transformers.CLIPTextConfig(**config).save_pretrained(folder)
    checkpoint = {f"text_encoders.clip_{letter}.transformer.{name}": torch.tensor(x) for name, x in tensors.items()}
    return create_diffusers_clip_model_from_ldm(CLIPTextModelWithProjection, checkpoint, config=str(folder))


@pytest.mark.parametrize("with_projection", [True, False])
def test_in_a_single_file_clip_l_is_not_projected_whether_it_brings_a_projection_or_not(tmp_path, with_projection):
    config = SMALL | {"projection_dim": 32, "hidden_act": "quick_gelu", "eos_token_id": LEGACY}
    tensors = state_of(make_theirs(config))
    if not with_projection:
        del tensors["text_projection.weight"]
    ids = make_ids(13, END)
    expected = run_theirs(from_single_file(config, "l", tensors, tmp_path), ids)
    ours = make_ours(config, tensors | {"logit_scale": np.float32(4)}, table.stability)
    assert max(errors(ours, ids, expected)) <= 1e-5
    np.testing.assert_array_equal(ours.projection.kernel[...], np.eye(32))


def test_in_a_single_file_big_g_is_projected(tmp_path):
    config = SMALL | {"projection_dim": 32, "hidden_act": "gelu", "eos_token_id": LEGACY}
    tensors = state_of(make_theirs(config))
    ids = make_ids(13, 0)
    expected = run_theirs(from_single_file(config, "g", tensors, tmp_path), ids)
    ours = make_ours(config, tensors | {"logit_scale": np.float32(4)}, table.stability)
    assert max(errors(ours, ids, expected)) <= 1e-5


def test_the_identity_takes_the_tensors_own_dtype():
    scale, projection = table.SCALE_AND_IDENTITY.to_jax(np.ones(8, jnp.bfloat16))
    assert scale.dtype == projection.dtype == jnp.bfloat16
    np.testing.assert_array_equal(projection.astype(np.float32), np.eye(8))


def test_a_projection_that_a_single_file_cannot_hold_is_not_dropped_silently():
    to_torch = table.SCALE_AND_IDENTITY.to_torch
    scale = np.arange(4.0)
    np.testing.assert_array_equal(to_torch([scale, np.eye(4)]), scale)
    with pytest.raises(NameTableError, match=r"text_projection\.weight .* not the identity"):
        to_torch([scale, 2 * np.eye(4)])


def test_a_wrong_shape_in_a_single_file_is_reported_as_such():
    config = SMALL | {"projection_dim": 32, "hidden_act": "quick_gelu"}
    tensors = state_of(make_theirs(config)) | {"text_model.final_layer_norm.weight": np.ones(31, np.float32)}
    with pytest.raises(NameTableError, match=r"wrong shape of text_model\.final_layer_norm\.weight: expected \[32\]"):
        make_ours(config, tensors, table.stability)


@pytest.mark.slow
@pytest.mark.parametrize("config", [CLIP_L, BIG_G], ids=["CLIP-L", "OpenCLIP bigG"])
def test_the_whole_model_at_its_published_size_equals_transformers(config, tmp_path):
    theirs = make_theirs(config)
    ids = make_ids(77, 0, batch=2, start=49406, end=49407)
    expected = run_theirs(theirs, ids)
    theirs.save_pretrained(tmp_path)
    del theirs
    gc.collect()
    parsed = CLIPTextConfig.from_json(config)
    ours = load_saved(abstract(lambda rngs: CLIPText(parsed, rngs=rngs)), table.diffusers(parsed), tmp_path)
    measured = errors(ours, ids, expected)
    print("penultimate, last, pooled:", *(f"{error:.1e}" for error in measured))
    assert max(measured) <= 1e-4
