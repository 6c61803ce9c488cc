"""Class names to token spans and prompts: against character offsets, exhaustive search and plain means."""

from __future__ import annotations

import itertools
import random
import warnings

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from seg4diff_jax.text import (
    Tokenizers,
    TokenSpan,
    Wording,
    balanced_groups,
    class_prompts,
    load_tokenizers,
    token_spans,
    tokenize,
    worded_prompts,
)
from tests.reference.random_weights import relative_error
from tests.reference.small_tokenizers import WORDS

ODD_NAMES = [
    *["wall-brick", "traffic  light", "Wardrobe", "don't", "dog's bed", "café", "naïve sofa", "3d", "4x4 car"],
    *[" ship ", "tree.", "(bed)", "ΣΑΣ", "東京", "🦊 fox", "chest of drawers;pot", "O'Neil's", "İstanbul"],
    *["x\u200by", "ground\n", "cat!", "quite an extraordinary xylophone"],
]
NAMES = [*WORDS, *ODD_NAMES, "pottedplant", "diningtable", "tvmonitor", "aeroplane", "zebra"]


@pytest.fixture(scope="module")
def tokenizers(sd3_checkpoint) -> Tokenizers:
    return load_tokenizers(sd3_checkpoint, t5=True)


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
    assert list(packed.prompt_of_name) == sorted(packed.prompt_of_name)
    assert set(packed.prompt_of_name) == set(range(len(packed.prompts)))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        ids = tokenize(tokenizers._replace(t5=None), packed.prompts)
    for name, prompt, span in zip(names, packed.prompt_of_name, packed.spans, strict=True):
        for row, tokenizer in ((ids.clip_l[prompt], tokenizers.clip_l), (ids.clip_g[prompt], tokenizers.clip_g)):
            alone = tokenizer(name, add_special_tokens=False).input_ids
            assert row[span.start : span.stop].tolist() == alone
    for prompt, text in enumerate(packed.prompts):
        group = [name for name, number in zip(names, packed.prompt_of_name, strict=True) if number == prompt]
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
    assert [packed.prompt_of_name.count(prompt) for prompt in range(2)] == [19, 19]
    assert packed.spans[18] == (37, 39)
    assert packed.spans[19] == (1, 3)


# Several names of a class, and words beside them

WORDINGS = [
    Wording("a photo of {}"),
    Wording("one {} , please", ("the", "of")),
    Wording(stop_words=("dining room", "a", "the")),
]


def spans_of_names(tokenizer, wording: Wording, names: list[str]) -> list[TokenSpan]:
    """Which tokens of the whole prompt lie within each name's characters, wherever its template puts them."""
    prompt, before = wording.prompt(names), len(wording.template.split("{}")[0])
    offsets = tokenizer(prompt, return_offsets_mapping=True).offset_mapping
    spans, begin = [], 0
    for name in names:
        first = begin + before
        inside = [
            token for token, (start, stop) in enumerate(offsets) if start < stop and first <= start < first + len(name)
        ]
        spans.append(TokenSpan(inside[0], inside[-1] + 1))
        begin += len(wording.template) - 2 + len(name) + 1
    return spans


@pytest.mark.parametrize("wording", WORDINGS, ids=str)
def test_a_names_tokens_are_its_own_whatever_stands_around_it(tokenizers, wording):
    draw = random.Random(str(wording))
    names = draw.sample(NAMES, 40)
    classes = [names[:1], *(names[start : start + 3] for start in range(1, 40, 3))]
    packed = worded_prompts(tokenizers, classes, wording)
    assert packed.classes == tuple(each[0] for each in classes)
    assert [classes[index][0] for index in packed.class_of_name[::3]] == [each[0] for each in classes]
    for number, text in enumerate(packed.prompts):
        own = [place for place, prompt in enumerate(packed.prompt_of_name) if prompt == number]
        assert text == wording.prompt([names[place] for place in own])
        for tokenizer in (tokenizers.clip_l, tokenizers.clip_g):
            assert len(tokenizer(text).input_ids) <= packed.length
            expected = spans_of_names(tokenizer, wording, [names[place] for place in own])
            assert [packed.spans[place] for place in own] == expected


def test_a_classes_score_is_the_mean_over_its_names_of_the_mean_over_their_tokens(tokenizers):
    draw = random.Random(3)
    names = draw.sample(NAMES, 60)
    classes = [names[start : start + 1 + start % 5] for start in range(0, 54, 6)]
    packed = worded_prompts(tokenizers, classes, Wording("a photo of {}", ("the",)))
    of_class = {index: [] for index in range(len(classes))}
    for index, prompt in zip(packed.class_of_name, packed.prompt_of_name, strict=True):
        of_class[index].append(prompt)
    assert any(len(set(prompts)) > 1 for prompts in of_class.values()), "no class has names in two prompts"
    maps = np.random.default_rng(0).random((len(packed.prompts), 5, packed.length), np.float32)
    scores = jnp.einsum("pnt,pct->cn", maps, packed.averaging(), precision="highest")
    expected, place = [], 0
    for each in classes:
        means = []
        for _ in each:
            span = packed.spans[place]
            means.append(maps[packed.prompt_of_name[place], :, span.start : span.stop].mean(1))
            place += 1
        expected.append(np.mean(means, axis=0))
    assert relative_error(scores, np.stack(expected)) <= 1e-6


def test_names_alone_are_the_papers_prompts(tokenizers):
    names = ["cat", "traffic light", "sofa"]
    assert worded_prompts(tokenizers, [(name,) for name in names]) == class_prompts(tokenizers, names)


@pytest.mark.parametrize(
    ("classes", "wording", "message"),
    [
        ([["cat"], []], {}, r"the names of a class are \[\]: expected a list of one or more"),
        ([["cat"], "dog"], {}, "the names of a class are 'dog': expected a list"),
        ([["cat", "dog"], ["dog"]], {}, "class name 'dog' is repeated; give each class a name of its own"),
        ([["cat"]], {"template": "a photo"}, r"the template is 'a photo': expected \{\} in it once"),
        ([["cat"]], {"template": "{} {}"}, r"the template is '\{\} \{\}': expected \{\} in it once"),
        (
            [["cat"]],
            {"template": "{}s"},
            r"'cat' is split into other tokens beside the words of '\{\}s'.*spaces around",
        ),
        ([["cat"]], {"template": "{} <|endoftext|>"}, "holds a token that starts or ends a prompt; leave it out"),
        ([["cat"]], {"stop_words": ("the",) * 75}, "'cat' has 1 tokens, a prompt room for 0 beside the other words of"),
    ],
)
def test_names_and_words_that_make_no_prompts_are_refused(tokenizers, classes, wording, message):
    with pytest.raises(ValueError, match=message):
        worded_prompts(tokenizers, classes, Wording(**wording))


# Spans to scores


def test_averaging_gives_each_class_the_mean_of_its_tokens_maps(tokenizers):
    packed = class_prompts(tokenizers, NAMES)
    assert len(packed.prompts) > 1
    maps = np.random.default_rng(0).random((len(packed.prompts), 6, packed.length), np.float32)
    scores = jnp.einsum("pnt,pct->cn", maps, packed.averaging(), precision="highest")
    expected = [
        maps[prompt, :, span.start : span.stop].mean(1)
        for prompt, span in zip(packed.prompt_of_name, packed.spans, strict=True)
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
    assert packed.prompt_of_name == (0, 1, 2)
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
