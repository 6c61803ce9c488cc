"""Tokenizers and the encoding of prompts, against diffusers' SD3 pipeline."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
import warnings
from pathlib import Path

import jax
import numpy as np
import pytest
from diffusers import StableDiffusion3Pipeline

from seg4diff_jax.convert.assemble import abstract, from_state_dict
from seg4diff_jax.convert.tables import clip as clip_table
from seg4diff_jax.convert.tables import t5 as t5_table
from seg4diff_jax.models.clip import CLIPText, CLIPTextConfig
from seg4diff_jax.models.encoders import Encoders, TokenIds
from seg4diff_jax.models.t5 import T5Config, T5Encoder
from seg4diff_jax.passes import encode_prompts
from seg4diff_jax.text import (
    Tokenizers,
    class_prompts,
    load_tokenizers,
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
    ours = encode_prompts(Encoders(None, *encoders), ids, joint_dim=context.shape[-1], t5_length=length)
    assert relative_error(ours.full_context, context) <= 1e-5
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
    conditioning = encode_prompts(Encoders(None, *encoders[:2]), ids, joint_dim=96)
    assert conditioning.context.shape == (1, 78, 96)
    context = conditioning.full_context
    assert context.shape == (1, 154, 96)
    assert not context[:, 77:].any()
    assert not context[:, :77, 80:].any()
    assert context[:, :77, :80].all()
    assert conditioning.segments == (("clip", 77), ("t5", 77))
    assert encode_prompts(Encoders(None, *encoders[:2]), ids, joint_dim=96, t5_length=0).segments == (("clip", 77),)


def test_the_conditioning_names_the_tokens_of_each_encoder(checkpoint, encoders):
    directory, t5 = checkpoint
    conditioning = encode_prompts(
        Encoders(None, *encoders), tokenize(load_tokenizers(directory, t5=t5), ["cat"], t5_length=20), joint_dim=96
    )
    assert conditioning.segments == (("clip", 77), ("t5", 20 if t5 else 77))
    assert [conditioning.tokens(name) for name in ("clip", "t5")] == [(0, 77), (77, 97 if t5 else 154)]


def test_encoding_under_jit_is_the_same(checkpoint, encoders):
    directory, t5 = checkpoint
    ids = tokenize(load_tokenizers(directory, t5=t5), ["a cat", "dog"], t5_length=20)
    compiled = encode_prompts(Encoders(None, *encoders), ids, joint_dim=96)
    with jax.disable_jit():
        uncompiled = encode_prompts(Encoders(None, *encoders), ids, joint_dim=96)
    for ours, eager in zip(jax.tree.leaves(compiled), jax.tree.leaves(uncompiled), strict=True):
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
        encode_prompts(Encoders(None, *encoders), wrong, joint_dim=96)


def test_states_that_do_not_fit_are_refused(checkpoint, encoders, tokenizers):
    _, t5 = checkpoint
    ids = tokenize(tokenizers if t5 else tokenizers._replace(t5=None), ["cat"])
    with pytest.raises(ValueError, match="80 wide together: expected at most joint_dim=64"):
        encode_prompts(Encoders(None, *encoders), ids, joint_dim=64)
    if t5:
        with pytest.raises(ValueError, match="T5's states are 96 wide: expected joint_dim=128"):
            encode_prompts(Encoders(None, *encoders), ids, joint_dim=128)


def test_no_prompts_and_a_bare_string_are_refused(tokenizers):
    with pytest.raises(ValueError, match=r'at least one prompt, found none; for no text write \[""\]'):
        tokenize(tokenizers, [])
    with pytest.raises(TypeError, match=r"found the string 'a cat'; write \['a cat'\]"):
        tokenize(tokenizers, "a cat")


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
