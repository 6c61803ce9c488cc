"""Attention to the words of a prompt: which columns they take, and their maps."""

from __future__ import annotations

import re
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import seg4diff_jax as s4d
from seg4diff_jax.convert.sources.open import MINIATURE
from seg4diff_jax.miniature.scenes import scene
from seg4diff_jax.miniature.world.shapes import CLASSES
from seg4diff_jax.models.attention import AttentionRequest, JointAttention
from seg4diff_jax.prompt_attention import text_columns
from seg4diff_jax.text import Tokenizers, load_tokenizers
from tests.reference.inputs import NAMES, SIZE, VARIED, an_image
from tests.reference.random_weights import relative_error

IMAGE = an_image(*SIZE)
GRID = (7, 9)
PROMPT = "a photo of a cat, two dogs and a traffic light"
SEGMENTS = (("clip", 77), ("t5", 77))


@pytest.fixture(scope="module")
def with_t5(sd3_checkpoint) -> s4d.Pipeline:
    return s4d.load(sd3_checkpoint, t5=True, blocks=1)


@pytest.fixture(scope="module")
def tokenizers(sd3_checkpoint) -> Tokenizers:
    return load_tokenizers(sd3_checkpoint, t5=True)


@pytest.fixture(scope="module")
def record(sd3) -> s4d.PromptAttention:
    return sd3.attention(IMAGE, PROMPT, blocks=VARIED)[VARIED]


def asked(pipe: s4d.Pipeline, prompt: str = PROMPT, **request: Any) -> s4d.PromptAttention:
    return pipe.attention(IMAGE, prompt, blocks=VARIED, request=AttentionRequest(**request))[VARIED]


def glued(pieces: list[str], ends: str, first: int) -> list[tuple[str, int, int]]:
    """Words of pieces, of which the last ends so, and where they are if the first piece is at `first`."""
    words, text, start = [], "", first
    for place, piece in enumerate(pieces, first):
        text += piece.removesuffix(ends)
        if piece.endswith(ends):
            words.append((text, start, place + 1))
            text, start = "", place + 1
    return words


def refusal(message: str) -> Any:
    return pytest.raises(ValueError, match=f"^{re.escape(message)}$")


# ---- columns --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "prompt",
    [PROMPT, "Two red  BUSES on the road; a bus", "a giraffe's shirt", "(zebra) crossing... and sofa?", "cat", ""],
)
def test_words_take_the_pieces_up_to_clips_end_of_word_and_pads_follow_the_end(sd3, tokenizers, prompt):
    record = asked(sd3, prompt)
    assert [(word.text.lower(), *word[1:]) for word in record.words] == glued(
        tokenizers.clip_l.tokenize(prompt), "</w>", first=1
    )
    mask = tokenizers.clip_l(prompt, padding="max_length").attention_mask
    np.testing.assert_array_equal(record.pads, np.flatnonzero(np.equal(mask, 0)))


def test_a_word_is_whole_and_neither_case_nor_commas_hide_it(sd3):
    record = asked(sd3, "a scar, a Cat, traffic, light and traffic light")
    assert record.columns("cat").tolist() == record.columns("CAT").tolist() == [record.words[4].start]
    assert len(record.columns("traffic light")) == 2
    assert record.columns("traffic light")[0] > record.columns("and")[0]
    assert asked(sd3, "a giraffe's fore\u0301t, no. 12").text.spoken == ["a", "giraffe", "fore\u0301t", "no", "12"]
    accented = [asked(sd3, prompt) for prompt in ("une fo\u0301ret", "une f\u00f3ret")]
    assert accented[0].columns("f\u00f3ret").tolist() == accented[1].columns("fo\u0301ret").tolist()
    with refusal(
        "the prompt 'a scar, a Cat, traffic, light and traffic light' has no 'car': "
        "its words are a, scar, Cat, traffic, light, and"
    ):
        record.of("car")
    with refusal(f"expected a word of the prompt {record.prompt!r}, found ' '"):
        record.of(" ")


def test_a_word_that_is_said_twice_is_everywhere_or_where_it_is_asked_for(sd3):
    record = asked(sd3, "a cat and a giraffe on a cat")
    first, second = (record.columns("a cat", occurrence=place) for place in (0, 1))
    assert first.tolist() == [1, 2]
    assert second.tolist() == [record.words[-2].start, record.words[-1].start]
    assert record.columns("a cat").tolist() == [*first, *second]
    both = np.mean([record.of("cat", occurrence=place) for place in (0, 1)], axis=0)
    assert relative_error(np.asarray(record.of("cat")), both) <= 1e-6
    with refusal(
        "occurrence is 2; the columns show 'cat' of the prompt 'a cat and a giraffe on a cat' 2 times: expected 0 to 1"
    ):
        record.of("cat", occurrence=2)


def test_columns_are_counted_from_the_first_that_is_shown(sd3, record):
    everything, some = asked(sd3, text_tokens=(0, None)), asked(sd3, text_tokens=(3, 12))
    assert everything.columns("cat").tolist() == record.columns("cat").tolist()
    np.testing.assert_array_equal(everything.pads, [*record.pads, *range(77, 154)])
    assert some.columns("cat").tolist() == (record.columns("cat") - 3).tolist()
    np.testing.assert_allclose(some.of("cat"), record.of("cat"), rtol=1e-6)
    assert some.pads.size == 0
    assert {word.text for word in some.words} < {word.text for word in record.words}
    with refusal(
        f"'traffic' of the prompt {PROMPT!r} has no columns among those that are shown: "
        "their words are of, a, cat, two, dogs, and"
    ):
        some.of("traffic")


def test_words_of_t5_take_its_own_tokens(with_t5, tokenizers):
    prompt = "a red car on the road"
    record = asked(with_t5, prompt, text_tokens="t5")
    pieces = [piece.replace("▁", "") for piece in tokenizers.t5.tokenize(prompt)]
    starts = [place for place, piece in enumerate(tokenizers.t5.tokenize(prompt)) if piece.startswith("▁")]
    spans = list(zip(starts, [*starts[1:], len(pieces)], strict=True))
    assert [word[1:] for word in record.words] == spans
    assert ["".join(pieces[start:stop]) for start, stop in spans] == prompt.split()
    np.testing.assert_array_equal(record.pads, np.arange(len(pieces) + 1, 256))
    both = asked(with_t5, prompt, text_tokens=(0, None))
    np.testing.assert_array_equal(both.columns("car"), asked(with_t5, prompt).columns("car"))
    assert len(both.words) == 12
    assert both.words[-1].stop == record.words[-1].stop + 77


def test_without_t5_its_columns_are_pads_and_no_words(sd3):
    record = asked(sd3, "a cat", text_tokens="t5")
    assert record.words == ()
    np.testing.assert_array_equal(record.pads, np.arange(77))
    with refusal(
        "'cat' of the prompt 'a cat' has no columns among those that are shown: "
        "they are pads, or zeros in the place of a T5 that is not loaded"
    ):
        record.of("cat")


def test_words_past_a_prompts_end_have_no_columns(sd3):
    with pytest.warns(UserWarning, match="and CLIP-(L|bigG) takes 77"):
        record = asked(sd3, "cat " * 74 + "giraffe dog")
    assert {word.text for word in record.words} == {"cat"}
    assert record.pads.size == 0
    with pytest.raises(ValueError, match=r"^'dog' of the prompt .* that are shown: their words are cat$"):
        record.of("dog")


def test_a_word_that_clips_tokenizers_put_at_different_places_has_no_columns(tokenizers):
    others = load_tokenizers(MINIATURE)
    assert len(others.clip_g.tokenize("cat")) > len(tokenizers.clip_l.tokenize("cat"))
    text = text_columns(Tokenizers(tokenizers.clip_l, others.clip_g), "a cat on grass", SEGMENTS, (0, 77))
    assert text.named("a").tolist() == [1]
    with refusal("'grass' of the prompt 'a cat on grass' has no columns among those that are shown: their words are a"):
        text.named("grass")


# ---- maps -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("mean_heads", [False, True])
@pytest.mark.parametrize("word", ["cat", "dogs", "traffic light"])
def test_a_words_map_is_the_mean_of_its_columns_and_of_heads_on_the_grid(sd3, word, mean_heads):
    record = asked(sd3, mean_heads=mean_heads)
    probs = np.asarray(record.probs)[0]
    probs = probs if mean_heads else probs.mean(axis=0)
    expected = np.mean([probs[:, column] for column in record.columns(word)], axis=0).reshape(GRID)
    found = record.of(word)
    assert record.grid == found.shape == GRID
    assert found.dtype == jnp.float32
    assert relative_error(np.asarray(found), expected) <= 1e-6


def test_words_maps_are_the_scores_of_classes_in_a_prompt_of_their_names(sd3):
    record = sd3.attention(IMAGE, " ".join(NAMES), blocks=VARIED)[VARIED]
    scores = sd3.segment(IMAGE, NAMES, block=VARIED).scores
    for name, score in zip(NAMES, scores, strict=True):
        assert relative_error(np.asarray(record.of(name)), score) <= 1e-5


def test_each_image_of_a_list_has_the_words_of_its_own_prompt(sd3):
    images, prompts = [IMAGE, an_image(84, 84), IMAGE], ["a dog", "the sky and a dog", "cat"]
    found = [records[VARIED] for records in sd3.attention(images, prompts, blocks=VARIED)]
    assert [record.prompt for record in found] == prompts
    assert [record.columns("dog").tolist() for record in found[:2]] == [[2], [5]]
    assert found[0].grid == GRID != found[1].grid == found[1].of("dog").shape
    with refusal("the prompt 'cat' has no 'dog': its words are cat"):
        found[2].of("dog")


def test_a_record_is_as_before_and_a_pytree_with_words_under_jit_grad_and_vmap(record):
    assert isinstance(record, JointAttention)
    assert record.scores is not None
    assert record.q is None
    assert jax.tree.leaves(record)[0].shape == (1, 4, 63, 77)
    expected = np.asarray(record.of("cat"))
    on_host = jax.tree.map(np.asarray, record)
    assert isinstance(on_host.probs, np.ndarray)
    np.testing.assert_allclose(on_host.of("cat"), expected, rtol=1e-6)
    np.testing.assert_allclose(jax.jit(lambda record: record.of("cat"))(record), expected, rtol=1e-6)
    pair = jax.tree.map(lambda leaf: jnp.concatenate([leaf, 2 * leaf]), record)
    np.testing.assert_allclose(pair.of("cat"), [expected, 2 * expected], rtol=1e-6)
    np.testing.assert_allclose(jax.vmap(lambda record: record.of("cat"))(pair), pair.of("cat"), rtol=1e-6)
    gradient = jax.grad(lambda record: record.of("dogs").sum())(record).probs
    columns = record.columns("dogs")
    np.testing.assert_allclose(gradient[..., columns], 1 / (4 * len(columns)), rtol=1e-6)
    assert np.count_nonzero(gradient) == 4 * 63 * len(columns)


@pytest.mark.parametrize("request_", [{"quadrants": ("text_to_image",)}, {"probs": False}])
def test_a_map_of_what_was_not_requested_is_refused(sd3, request_):
    record = asked(sd3, **request_)
    assert len(record.columns("cat")) == 1
    with refusal(
        "a word's map is made of image-to-text probabilities, which were not requested: "
        "give AttentionRequest quadrants=('image_to_text',) and probs=True"
    ):
        record.of("cat")


def test_the_miniatures_expert_block_puts_a_words_attention_where_its_thing_is():
    pipe = s4d.load("miniature")
    seen = 0
    for index in range(8):
        shown = scene("test", index, pipe.trained_size)
        names = [CLASSES[number] for number in shown.classes]
        record = pipe.attention(shown.image, f"a picture of {' and '.join(names)}", blocks=3)[3]
        rows, columns = record.grid
        for number, name in zip(shown.classes, names, strict=True):
            inside = (shown.labels == number).reshape(rows, 64 // rows, columns, 64 // columns).mean(axis=(1, 3))
            if inside.max() == 1:
                words = np.asarray(record.of(name))
                assert words[inside == 1].mean() > 2 * words[inside == 0].mean(), (index, name)
                seen += 1
    assert seen >= 16
