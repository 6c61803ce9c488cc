"""Prompts and class names against diffusers' SD3 pipeline, character offsets and exhaustive search."""

from __future__ import annotations

import itertools
import json
import random
import shutil
import subprocess
import sys
import warnings
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from diffusers import StableDiffusion3Pipeline

from convert.assemble import abstract, from_state_dict
from convert.tables import clip as clip_table
from convert.tables import t5 as t5_table
from seg4diff_jax.models.clip import CLIPText, CLIPTextConfig
from seg4diff_jax.models.t5 import T5Config, T5Encoder
from seg4diff_jax.text import (
    TokenIds,
    Tokenizers,
    TokenSpan,
    balanced_groups,
    class_prompts,
    encode_prompts,
    load_tokenizers,
    token_spans,
    tokenize,
)
from tests.reference.random_weights import relative_error
from tests.reference.small_tokenizers import WORDS

PROMPTS = {
    "one": ["a photo of a cat"],
    "empty": [""],
    "batch": ["a red car on the road", "", "Sofa, pottedplant & tvmonitor!"],
    "any text": ["été  in 東京\n🦊 won't  STOP!!", "<|endoftext|> cat"],
    "too long": ["a cat " * 60 + "dog", "short"],
    "exactly full": ["cat " * 75],
    "one too many": ["cat " * 75 + "dog"],
}
ODD_NAMES = [
    *["wall-brick", "traffic  light", "Wardrobe", "don't", "dog's bed", "café", "naïve sofa", "3d", "4x4 car"],
    *[" ship ", "tree.", "(bed)", "ΣΑΣ", "東京", "🦊 fox", "chest of drawers;pot", "O'Neil's", "İstanbul"],
    *["x\u200by", "ground\n", "cat!", "quite an extraordinary xylophone"],
]
NAMES = [*WORDS, *ODD_NAMES, "pottedplant", "diningtable", "tvmonitor", "aeroplane", "zebra"]

encode = jax.jit(encode_prompts, static_argnames=("joint_dim", "t5_length"))


@pytest.fixture(scope="module", params=[True, False], ids=["with T5", "without T5"])
def checkpoint(request, checkpoint_factory) -> tuple[Path, bool]:
    return checkpoint_factory(variant="sd3", t5=request.param), request.param


@pytest.fixture(scope="module")
def pipeline(checkpoint) -> StableDiffusion3Pipeline:
    directory, t5 = checkpoint
    absent = {} if t5 else {"text_encoder_3": None, "tokenizer_3": None}
    return StableDiffusion3Pipeline.from_pretrained(directory, **absent)


@pytest.fixture(scope="module")
def encoders(pipeline) -> tuple[CLIPText, CLIPText, T5Encoder | None]:
    def translated(module, config, make, table):
        state = {name: tensor.numpy() for name, tensor in module.state_dict().items()}
        return from_state_dict(abstract(lambda rngs: make(config, rngs=rngs)), table.diffusers(config), state)

    clip_l, clip_g = (
        translated(module, CLIPTextConfig.from_json(module.config.to_dict()), CLIPText, clip_table)
        for module in (pipeline.text_encoder, pipeline.text_encoder_2)
    )
    if pipeline.text_encoder_3 is None:
        return clip_l, clip_g, None
    config = T5Config.from_json(pipeline.text_encoder_3.config.to_dict())
    return clip_l, clip_g, translated(pipeline.text_encoder_3, config, T5Encoder, t5_table)


@pytest.fixture(scope="module")
def tokenizers(sd3_checkpoint) -> Tokenizers:
    return load_tokenizers(sd3_checkpoint, t5=True)


def quietly(function, *arguments, **options):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return function(*arguments, **options)


# Prompts to context


@pytest.mark.parametrize("length", [77, 256])
@pytest.mark.parametrize("prompts", PROMPTS.values(), ids=PROMPTS.keys())
def test_encoding_is_that_of_diffusers(checkpoint, pipeline, encoders, prompts, length):
    directory, t5 = checkpoint
    context, _, pooled, _ = pipeline.encode_prompt(
        prompts, None, None, do_classifier_free_guidance=False, max_sequence_length=length
    )
    ids = quietly(tokenize, load_tokenizers(directory, t5=t5), prompts, t5_length=length)
    ours = encode(*encoders, ids, joint_dim=context.shape[-1], t5_length=length)
    assert relative_error(ours.context, context) <= 1e-5
    assert relative_error(ours.pooled, pooled) <= 1e-5
    # T5's states are larger than CLIP's and would hide their error.
    assert relative_error(ours.context[:, :77], context[:, :77]) <= 1e-5


@pytest.mark.parametrize("prompts", PROMPTS.values(), ids=PROMPTS.keys())
def test_ids_are_those_of_the_tokenizers_own_padding_and_truncation(tokenizers, prompts):
    ids = quietly(tokenize, tokenizers, prompts, t5_length=40)
    for ours, tokenizer, length in zip(ids, tokenizers, (77, 77, 40), strict=True):
        theirs = tokenizer(prompts, padding="max_length", max_length=length, truncation=True).input_ids
        np.testing.assert_array_equal(ours, theirs)


def test_clip_l_pads_with_the_end_token_and_bigg_with_the_exclamation_mark(tokenizers):
    ids = tokenize(tokenizers, ["cat"])
    end = tokenizers.clip_l.convert_tokens_to_ids("<|endoftext|>")
    assert ids.clip_l[0, 2:].tolist() == [end] * 75
    assert ids.clip_g[0, 2:].tolist() == [end] + [0] * 74
    assert end == ids.clip_l.max() == len(tokenizers.clip_l) - 1


def test_without_t5_as_many_zero_tokens_as_clip_tokens_follow(encoders, tokenizers):
    ids = tokenize(tokenizers._replace(t5=None), ["cat"])
    context, _ = encode(*encoders[:2], None, ids, joint_dim=96)
    assert context.shape == (1, 154, 96)
    assert not context[:, 77:].any()
    assert not context[:, :77, 80:].any()
    assert context[:, :77, :80].all()


def test_encoding_under_jit_is_the_same(checkpoint, encoders):
    directory, t5 = checkpoint
    ids = tokenize(load_tokenizers(directory, t5=t5), ["a cat", "dog"], t5_length=20)
    compiled = encode(*encoders, ids, joint_dim=96)
    for ours, eager in zip(compiled, encode_prompts(*encoders, ids, joint_dim=96), strict=True):
        assert relative_error(ours, np.asarray(eager)) <= 1e-6


@pytest.mark.parametrize(
    ("prompt", "encoder", "lost"),
    [("a cat " * 37 + "a big dog", "CLIP-L takes 77", "'big dog'"), ("sofa " * 9, "T5 takes 8", "'sofa sofa'")],
)
def test_a_prompt_cut_short_is_warned_about_with_what_was_lost(tokenizers, prompt, encoder, lost):
    with warnings.catch_warnings(record=True) as found:
        warnings.simplefilter("always")
        tokenize(tokenizers, [prompt], t5_length=8)
    assert any(encoder in str(warning.message) and lost in str(warning.message) for warning in found)


def test_a_prompt_that_fits_exactly_is_not_warned_about(tokenizers):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        tokenize(tokenizers, ["cat " * 75], t5_length=76)


def test_ids_and_encoders_that_do_not_belong_together_are_refused(checkpoint, encoders, tokenizers):
    _, t5 = checkpoint
    ids = tokenize(tokenizers, ["cat"])
    wrong = TokenIds(ids.clip_l, ids.clip_g) if t5 else ids
    found = "T5's encoder without its ids" if t5 else "T5's ids without its encoder"
    with pytest.raises(ValueError, match=found):
        encode_prompts(*encoders, wrong, joint_dim=96)


def test_states_that_do_not_fit_are_refused(checkpoint, encoders, tokenizers):
    _, t5 = checkpoint
    ids = tokenize(tokenizers if t5 else tokenizers._replace(t5=None), ["cat"])
    with pytest.raises(ValueError, match="80 wide together: expected at most joint_dim=64"):
        encode_prompts(*encoders, ids, joint_dim=64)
    if t5:
        with pytest.raises(ValueError, match="T5's states are 96 wide: expected joint_dim=128"):
            encode_prompts(*encoders, ids, joint_dim=128)


def test_no_prompts_and_a_bare_string_are_refused(tokenizers):
    with pytest.raises(ValueError, match=r'at least one prompt, found none; for no text write \[""\]'):
        tokenize(tokenizers, [])
    with pytest.raises(TypeError, match=r"found the string 'a cat'; write \['a cat'\]"):
        tokenize(tokenizers, "a cat")


# Class names to spans


def spans_by_characters(tokenizer, names: list[str]) -> list[TokenSpan]:
    """Which tokens of the whole prompt lie within each name's characters."""
    prompt = " ".join(names)
    offsets = tokenizer(prompt, return_offsets_mapping=True, add_special_tokens=True).offset_mapping
    spans, begin = [], 0
    for name in names:
        inside = [
            token for token, (start, stop) in enumerate(offsets) if start < stop and begin <= start < begin + len(name)
        ]
        assert inside == list(range(inside[0], inside[-1] + 1))
        spans.append(TokenSpan(inside[0], inside[-1] + 1))
        begin += len(name) + 1
    return spans


@pytest.mark.parametrize("seed", range(20))
def test_spans_are_the_tokens_of_the_names_characters(tokenizers, seed):
    draw = random.Random(seed)
    pool = [*NAMES, *(f"{first} {second}" for first, second in itertools.pairwise(draw.sample(WORDS, 6)))]
    names = draw.sample(pool, draw.randint(1, 14))
    for tokenizer in (tokenizers.clip_l, tokenizers.clip_g):
        assert list(token_spans(tokenizer, names)) == spans_by_characters(tokenizer, names)


@pytest.mark.parametrize("seed", range(20))
def test_packed_prompts_hold_every_class_once_in_order_and_nothing_is_cut(tokenizers, seed):
    draw = random.Random(seed)
    names = draw.sample(NAMES, draw.randint(1, len(NAMES)))
    packed = class_prompts(tokenizers, names)
    assert packed.classes == tuple(names)
    assert list(packed.prompt_of_class) == sorted(packed.prompt_of_class)
    assert set(packed.prompt_of_class) == set(range(len(packed.prompts)))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        ids = tokenize(tokenizers._replace(t5=None), packed.prompts)
    for name, prompt, span in zip(names, packed.prompt_of_class, packed.spans, strict=True):
        for row, tokenizer in ((ids.clip_l[prompt], tokenizers.clip_l), (ids.clip_g[prompt], tokenizers.clip_g)):
            alone = tokenizer(name, add_special_tokens=False).input_ids
            assert row[span.start : span.stop].tolist() == alone
    for prompt, text in enumerate(packed.prompts):
        group = [name for name, number in zip(names, packed.prompt_of_class, strict=True) if number == prompt]
        assert text == " ".join(group)


def test_one_prompts_spans_start_after_the_start_token(tokenizers):
    packed = class_prompts(tokenizers, ["cat", "traffic light", "sofa"])
    assert packed.prompts == ("cat traffic light sofa",)
    assert packed.spans == ((1, 2), (2, 4), (4, 5))
    assert packed.length == 77


@pytest.mark.parametrize("seed", range(200))
def test_packing_is_the_best_of_all_splits(seed):
    draw = random.Random(seed)
    room = draw.randint(3, 20)
    counts = [draw.randint(1, draw.choice([2, room])) for _ in range(draw.randint(1, 9))]

    def splits():
        for cuts in range(len(counts)):
            for places in itertools.combinations(range(1, len(counts)), cuts):
                edges = [0, *places, len(counts)]
                yield [slice(*edge) for edge in itertools.pairwise(edges)]

    def cost(split):
        totals = [sum(counts[run]) for run in split]
        # Fewest, then the smallest largest, then the longest first runs.
        return len(split), max(totals), [-(run.stop - run.start) for run in split]

    allowed = [split for split in splits() if all(sum(counts[run]) <= room for run in split)]
    assert balanced_groups(counts, room) == min(allowed, key=cost)


def test_a_vocabulary_too_long_by_one_token_is_split_in_halves(tokenizers):
    names = [f"{first} {second}" for first, second in itertools.combinations(WORDS[:10], 2)][:38]
    packed = class_prompts(tokenizers, names)
    assert [packed.prompt_of_class.count(prompt) for prompt in range(2)] == [19, 19]
    assert packed.spans[18] == (37, 39)
    assert packed.spans[19] == (1, 3)


# Spans to scores


def test_averaging_gives_each_class_the_mean_of_its_tokens_maps(tokenizers):
    packed = class_prompts(tokenizers, NAMES)
    assert len(packed.prompts) > 1
    maps = np.random.default_rng(0).random((len(packed.prompts), 6, packed.length), np.float32)
    scores = jnp.einsum("pnt,pct->cn", maps, packed.averaging(), precision="highest")
    expected = [
        maps[prompt, :, span.start : span.stop].mean(1)
        for prompt, span in zip(packed.prompt_of_class, packed.spans, strict=True)
    ]
    assert relative_error(scores, np.stack(expected)) <= 1e-6


def test_padded_class_lists_of_varied_length_share_one_compiled_program(tokenizers):
    traces = []

    @jax.jit
    def score(maps, averaging):
        traces.append(maps.shape)
        return jnp.einsum("pnt,pct->cn", maps, averaging)

    maps = jnp.ones((1, 4, 77))
    for names in (["cat"], ["cat", "pottedplant"], WORDS[:10]):
        scores = score(maps, class_prompts(tokenizers, names).averaging(classes=10))
        np.testing.assert_allclose(scores[: len(names)], 1, rtol=1e-6)
        assert not scores[len(names) :].any()
    assert len(traces) == 1


def test_more_classes_than_rows_are_refused(tokenizers):
    with pytest.raises(ValueError, match="2 classes do not fit in classes=1 rows"):
        class_prompts(tokenizers, ["cat", "dog"]).averaging(classes=1)


# Refusals


@pytest.mark.parametrize(
    ("names", "message"),
    [
        ([], "the list of class names is empty"),
        (["cat", ""], r"class name 1 is blank \(''\)"),
        ([" \t", "cat"], r"class name 0 is blank \(' \\t'\)"),
        (["cat", "dog", "cat"], "class name 'cat' is repeated; give each class a name of its own"),
        (["Cat", "cat"], "class name 'cat' is repeated: to the text encoder it is 'Cat'"),
        (["traffic light", "traffic  light"], "class name 'traffic  light' is repeated"),
        (["caf\u00e9", "cafe\u0301"], "is repeated: to the text encoder it is"),
        (["cat", "<|endoftext|>"], r"class name '<\|endoftext\|>' holds a token that starts or ends a prompt"),
        (["<|startoftext|> cat"], "holds a token that starts or ends a prompt"),
        (["cat", "dog " * 76], r"class name 'dog dog .*\.\.\.' has 76 tokens, a prompt room for 75; shorten it"),
    ],
)
def test_bad_class_lists_are_refused_by_name(tokenizers, names, message):
    with pytest.raises(ValueError, match=message):
        class_prompts(tokenizers, names)


def test_a_bare_string_is_no_list_of_classes(tokenizers):
    for function, argument in ((class_prompts, tokenizers), (token_spans, tokenizers.clip_l)):
        with pytest.raises(TypeError, match=r"found the string 'cat'; write \['cat'\]"):
            function(argument, "cat")


def test_the_longest_name_that_fits_is_a_prompt_of_its_own(tokenizers):
    packed = class_prompts(tokenizers, ["cat", "dog " * 75, "sofa"])
    assert packed.prompt_of_class == (0, 1, 2)
    assert packed.spans[1] == (1, 76)


def test_a_name_that_both_tokenizers_split_differently_is_refused(sd3_checkpoint):
    tokenizers = load_tokenizers(sd3_checkpoint)
    tokenizers.clip_l.add_tokens(["!!"])  # one token of CLIP's own vocabulary, and two padding tokens to bigG
    assert class_prompts(tokenizers, ["cat!", "dog"]).spans == ((1, 3), (3, 4))
    with pytest.raises(ValueError, match=r"class name 'cat!!' is 2 tokens for tokenizer and 3 for tokenizer_2.*'!'"):
        class_prompts(tokenizers, ["dog", "cat!!"])


def test_a_token_that_joins_two_names_is_refused(sd3_checkpoint):
    tokenizers = load_tokenizers(sd3_checkpoint)
    tokenizers.clip_l.add_tokens(["red cat"])
    assert class_prompts(tokenizers, ["cat", "red"]).spans == ((1, 2), (2, 3))
    with pytest.raises(ValueError, match="class name 'red' is split into other tokens beside its neighbours"):
        class_prompts(tokenizers, ["sofa", "red", "cat"])


# Loading


@pytest.fixture
def copied(sd3_checkpoint, tmp_path) -> Path:
    for name in ("tokenizer", "tokenizer_2", "tokenizer_3"):
        shutil.copytree(sd3_checkpoint / name, tmp_path / name)
    return tmp_path


def test_t5s_tokenizer_is_loaded_on_request(copied):
    assert load_tokenizers(copied).t5 is None
    assert load_tokenizers(str(copied), t5=True).t5 is not None


@pytest.mark.parametrize(
    ("lost", "message"),
    [
        ("tokenizer/merges.txt", "tokenizer holds no tokenizer: expected tokenizer.json or vocab.json with merges.txt"),
        ("tokenizer_2/vocab.json", "tokenizer_2 holds no tokenizer"),
        ("tokenizer_3/spiece.model", "tokenizer_3 holds no tokenizer: expected tokenizer.json or spiece.model"),
    ],
)
def test_an_absent_vocabulary_is_named(copied, lost, message):
    (copied / lost).unlink()
    with pytest.raises(FileNotFoundError, match=message):
        load_tokenizers(copied, t5=True)


def test_an_unreadable_tokenizer_is_named(copied):
    path = copied / "tokenizer_2" / "vocab.json"
    path.write_text(path.read_text(encoding="utf-8")[:1000], encoding="utf-8")
    with pytest.raises(ValueError, match="tokenizer_2 cannot be read as a CLIPTokenizer"):
        load_tokenizers(copied)


def change_length(directory: Path, length: int | None) -> None:
    path = directory / "tokenizer_config.json"
    config = json.loads(path.read_text()) | {"model_max_length": length}
    path.write_text(json.dumps({key: value for key, value in config.items() if value is not None}))


def test_tokenizers_without_a_length_or_of_two_lengths_are_refused(copied):
    change_length(copied / "tokenizer_2", 64)
    with pytest.raises(ValueError, match="one model_max_length, found 77 and 64"):
        load_tokenizers(copied)
    change_length(copied / "tokenizer_2", None)
    with pytest.raises(ValueError, match=r"tokenizer_2/tokenizer_config\.json names no model_max_length"):
        load_tokenizers(copied)


def test_shorter_tokenizers_make_shorter_prompts(copied):
    change_length(copied / "tokenizer", 12)
    change_length(copied / "tokenizer_2", 12)
    tokenizers = load_tokenizers(copied)
    packed = class_prompts(tokenizers, WORDS[:11])
    assert len(packed.prompts) == 2
    assert packed.averaging().shape == (2, 11, 12)
    assert tokenize(tokenizers, packed.prompts).clip_l.shape == (2, 12)


def test_importing_the_module_imports_neither_transformers_nor_torch():
    code = "import sys, seg4diff_jax.text; print([name for name in ('transformers', 'torch') if name in sys.modules])"
    assert subprocess.check_output([sys.executable, "-c", code], text=True).strip() == "[]"
