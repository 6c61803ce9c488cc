"""T5's encoder equals transformers' T5EncoderModel called without a mask, in fp32 and in half precision."""

from __future__ import annotations

import gc

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
import transformers
from transformers import T5EncoderModel
from transformers.models.t5.modeling_t5 import T5Attention

from seg4diff_jax.convert.assemble import abstract, from_state_dict
from seg4diff_jax.convert.names import NameTableError, assign, assign_back, parameter_shapes
from seg4diff_jax.convert.tables import t5 as table
from seg4diff_jax.models.t5 import T5Config, T5Encoder, relative_buckets
from tests.reference.random_weights import randomize_, relative_error
from tests.reference.saved import load_saved

SMALL = {
    "vocab_size": 99,
    "d_model": 32,
    "d_kv": 6,
    "d_ff": 48,
    "num_layers": 3,
    "num_heads": 4,
    "feed_forward_proj": "gated-gelu",
    "tie_word_embeddings": False,
}
XXL = {
    "vocab_size": 32128,
    "d_model": 4096,
    "d_kv": 64,
    "d_ff": 10240,
    "num_layers": 24,
    "num_heads": 64,
    "feed_forward_proj": "gated-gelu",
    "dense_act_fn": "gelu_new",
    "is_gated_act": True,
    "layer_norm_epsilon": 1e-6,
    "relative_attention_num_buckets": 32,
    "relative_attention_max_distance": 128,
    "tie_word_embeddings": False,
}
BOTH_NAMES = ("shared.weight", "encoder.embed_tokens.weight")


def make_theirs(config: dict) -> T5EncoderModel:
    return randomize_(T5EncoderModel(transformers.T5Config(**config)))


def state_of(theirs: torch.nn.Module) -> dict[str, np.ndarray]:
    return {name: tensor.numpy() for name, tensor in theirs.state_dict().items()}


def make_ours(config: dict, tensors: dict[str, np.ndarray], rules=table.diffusers, **options) -> T5Encoder:
    parsed = T5Config.from_json(config)
    return from_state_dict(abstract(lambda rngs: T5Encoder(parsed, rngs=rngs, **options)), rules(parsed), tensors)


def make_pair(**changes) -> tuple[T5EncoderModel, T5Encoder]:
    theirs = make_theirs(SMALL | changes)
    return theirs, make_ours(theirs.config.to_dict(), state_of(theirs))


def make_ids(tokens: int, batch: int = 2) -> np.ndarray:
    """Words, the end token 1, and padding 0; the last text fills its row."""
    ids = np.random.default_rng(tokens).integers(2, 99, (batch, tokens))
    for row, length in zip(ids, np.linspace(1, tokens, batch).astype(int), strict=True):
        row[length - 1], row[length:] = 1, 0
    return ids


def run_theirs(theirs: T5EncoderModel, ids: np.ndarray) -> np.ndarray:
    with torch.no_grad():
        return theirs(torch.tensor(ids))[0].float().numpy()


def run_ours(ours: T5Encoder, ids: np.ndarray) -> jax.Array:
    return jax.jit(T5Encoder.__call__)(ours, jnp.asarray(ids))


def test_the_published_config_is_read_whole():
    parsed = T5Config.from_json(XXL | {"architectures": ["T5EncoderModel"], "model_type": "t5"})
    for name, value in vars(parsed).items():
        assert value == XXL[name], name


def test_absent_keys_take_the_defaults_of_transformers():
    theirs = transformers.T5Config(feed_forward_proj="gated-gelu")
    for name, value in vars(T5Config.from_json({"feed_forward_proj": "gated-gelu"})).items():
        assert value == getattr(theirs, name), name


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("feed_forward_proj", "relu"),
        ("feed_forward_proj", "gated-silu"),
        ("dense_act_fn", "gelu"),
        ("is_decoder", True),
    ],
)
def test_a_variant_that_is_not_implemented_is_refused_by_name(name, value):
    with pytest.raises(ValueError, match=f"{name} is {value!r}"):
        T5Config.from_json(SMALL | {name: value})


def test_a_config_that_does_not_say_its_feed_forward_layer_means_the_first_t5_and_is_refused():
    with pytest.raises(ValueError, match="feed_forward_proj is 'relu'"):
        T5Config.from_json({"d_model": 32})


@pytest.mark.parametrize("tokens", [1, 2, 77, 256])
def test_states_equal_transformers_at_any_length(tokens):
    theirs, ours = make_pair()
    ids = make_ids(tokens)
    assert relative_error(run_ours(ours, ids), run_theirs(theirs, ids)) <= 1e-5


def test_distances_beyond_the_farthest_bucket_equal_transformers():
    theirs, ours = make_pair(relative_attention_num_buckets=12, relative_attention_max_distance=20)
    ids = make_ids(100)
    assert relative_error(run_ours(ours, ids), run_theirs(theirs, ids)) <= 1e-5


def test_the_position_bias_tells_orders_apart():
    _, ours = make_pair()
    ids = make_ids(13)
    forward, backward = run_ours(ours, ids), run_ours(ours, ids[:, ::-1].copy())[:, ::-1]
    assert relative_error(forward, np.asarray(backward)) > 0.05


@pytest.mark.parametrize("buckets", [4, 8, 12, 32, 64, 128])
def test_buckets_equal_those_of_transformers(buckets):
    position = torch.arange(600)
    for max_distance in (40, 64, 100, 128, 200, 256, 500, 512):
        theirs = T5Attention._relative_position_bucket(position[None] - position[:, None], True, buckets, max_distance)
        ours = relative_buckets(600, buckets, max_distance)
        np.testing.assert_array_equal(ours, theirs.numpy(), err_msg=f"max_distance {max_distance}")


def test_the_program_does_not_grow_with_depth():
    sizes = []
    for layers in (2, 8):
        config = T5Config.from_json(SMALL | {"num_layers": layers})
        model = abstract(lambda rngs, config=config: T5Encoder(config, rngs=rngs))
        sizes.append(len(str(jax.make_jaxpr(T5Encoder.__call__)(model, jnp.zeros((1, 7), int))).splitlines()))
    assert sizes[0] == sizes[1]


def make_theirs_as_if_trained() -> T5EncoderModel:
    """T5 does not scale q.k: its query weights hold the 1 / sqrt(d_kv). Larger scores mostly measure their rounding."""
    theirs = make_theirs(SMALL)
    with torch.no_grad():
        for block in theirs.encoder.block:
            block.layer[0].SelfAttention.q.weight *= SMALL["d_kv"] ** -0.5
    return theirs


# Measured over four seeds: 1.1e-2 to 2.1e-2 in bf16 (PyTorch 1.7e-2 to 3.3e-2), 1.4e-3 to 3.0e-3 in fp16.
HALF = [(jnp.bfloat16, 3e-2), (jnp.float16, 5e-3)]


@pytest.mark.parametrize(("dtype", "bound"), HALF)
def test_half_precision_stays_close_to_fp32_and_as_close_as_in_torch(dtype, bound):
    theirs = make_theirs_as_if_trained()
    ids = make_ids(77)
    expected = run_theirs(theirs, ids)
    half = run_ours(make_ours(theirs.config.to_dict(), state_of(theirs), dtype=dtype), ids)
    in_torch = relative_error(run_theirs(theirs.to(getattr(torch, jnp.dtype(dtype).name)), ids), expected)
    assert half.dtype == dtype
    assert relative_error(half, expected) <= bound
    assert relative_error(half, expected) <= 1.2 * in_torch


# Measured: 4.1e-2 in bf16 (PyTorch 8.2e-2), 3.9e-3 in fp16 (PyTorch, all in fp16: 1.2).
@pytest.mark.parametrize(("dtype", "bound"), [(jnp.bfloat16, 6e-2), (jnp.float16, 6e-3)])
def test_a_residual_stream_beyond_the_range_of_fp16_does_no_harm(dtype, bound):
    theirs = make_theirs_as_if_trained()
    with torch.no_grad():
        for block in theirs.encoder.block:
            block.layer[1].DenseReluDense.wo.weight *= 1e5
    ids = make_ids(77)
    expected = run_theirs(theirs, ids)
    with torch.no_grad():
        states = theirs(torch.tensor(ids), output_hidden_states=True).hidden_states
    assert states[1].abs().max() > np.finfo(np.float16).max
    # A weight of 1e5 / sqrt(48) fits fp16.
    half = run_ours(make_ours(theirs.config.to_dict(), state_of(theirs), dtype=dtype), ids)
    assert relative_error(half, expected) <= bound


def test_the_table_names_every_tensor_back_once():
    theirs, ours = make_pair()
    back = assign_back(table.diffusers(ours.config), parameter_shapes(ours))
    assert {assignment.source for assignment in back} == set(theirs.state_dict()) - {"encoder.embed_tokens.weight"}


@pytest.mark.parametrize("rules", [table.diffusers, table.stability])
@pytest.mark.parametrize("present", [BOTH_NAMES, BOTH_NAMES[:1], BOTH_NAMES[1:], BOTH_NAMES[::-1]])
def test_the_embedding_is_read_under_either_name_and_once_if_it_has_both(present, rules):
    theirs, ours = make_pair()
    tensors = state_of(theirs)
    embedding = tensors["shared.weight"]
    for name in BOTH_NAMES:
        del tensors[name]
    tensors = dict.fromkeys(present, embedding) | tensors
    shapes = {name: tensor.shape for name, tensor in tensors.items()}
    sources = [a.source for a in assign(rules(ours.config), shapes, parameter_shapes(ours))]
    assert [name for name in sources if name in BOTH_NAMES] == [min(present, key=BOTH_NAMES.index)]
    again = make_ours(theirs.config.to_dict(), tensors, rules)
    np.testing.assert_array_equal(again.token_embedding.embedding[...], embedding)


def test_an_embedding_under_neither_name_is_missed():
    theirs, _ = make_pair()
    tensors = {name: tensor for name, tensor in state_of(theirs).items() if name not in BOTH_NAMES}
    with pytest.raises(NameTableError, match=r"missing tensor shared\.weight \[\d+, \d+\]"):
        make_ours(theirs.config.to_dict(), tensors)


def test_a_second_embedding_of_another_shape_is_refused():
    theirs, _ = make_pair()
    tensors = state_of(theirs) | {"encoder.embed_tokens.weight": np.zeros((98, 32), np.float32)}
    with pytest.raises(NameTableError, match=r"wrong shape of encoder\.embed_tokens\.weight: expected \[99, 32\]"):
        make_ours(theirs.config.to_dict(), tensors)


def test_a_single_files_logit_scale_is_redundant():
    theirs, ours = make_pair()
    again = make_ours(theirs.config.to_dict(), state_of(theirs) | {"logit_scale": np.float32(4)}, table.stability)
    ids = make_ids(7)
    np.testing.assert_array_equal(run_ours(again, ids), run_ours(ours, ids))


@pytest.mark.slow
def test_one_layer_at_the_published_width_equals_transformers(tmp_path):
    config = XXL | {"num_layers": 1, "vocab_size": 512}
    theirs = make_theirs(config)
    inputs = [make_ids(tokens) for tokens in (77, 256)]
    expected = [run_theirs(theirs, ids) for ids in inputs]
    theirs.save_pretrained(tmp_path)
    del theirs
    gc.collect()
    parsed = T5Config.from_json(config)
    ours = load_saved(abstract(lambda rngs: T5Encoder(parsed, rngs=rngs)), table.diffusers(parsed), tmp_path)
    measured = [relative_error(run_ours(ours, ids), states) for ids, states in zip(inputs, expected, strict=True)]
    print("77 and 256 tokens:", *(f"{error:.1e}" for error in measured))
    assert max(measured) <= 1e-4
