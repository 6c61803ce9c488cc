"""Attention that knows its prompt: which text columns are a word, which are pads, and the grid of image tokens."""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import jax
import numpy as np
from jaxtyping import Array, Float, Int

from seg4diff_jax.models.attention import AttentionRequest, JointAttention
from seg4diff_jax.models.conditioning import TextConditioning
from seg4diff_jax.text import Tokenizer, Tokenizers

WORD = re.compile(r"'(?:s|t|re|ve|m|ll|d)\b|[^\W\d_](?:[^\W\d_]|[\u0300-\u036f])*|\d+|(?:[^\s\w]|_)+", re.IGNORECASE)
"""How CLIP's tokenizers split text before they look at its letters: endings, words, numbers, other signs."""


class Word(NamedTuple):
    """A word of a prompt, a number or other signs: columns `start` to `stop` (not included)."""

    text: str
    start: int
    stop: int


@dataclass(frozen=True)
class TextColumns:
    """What the text columns of a record are. Hashable, so that it can be static under jit.

    Attributes:
      prompt: what the text encoders were told.
      segments: the words that are whole among the columns, in order, of CLIP's tokens and of T5's each by themselves.
      pads: columns of pad tokens, and of zeros in the place of a T5 that is not loaded.
      count: number of columns.
    """

    prompt: str
    segments: tuple[tuple[Word, ...], ...]
    pads: tuple[int, ...]
    count: int

    def named(self, phrase: str, occurrence: int | None = None) -> Int[np.ndarray, " columns"]:
        """Columns of a word, or of several that follow one another. Arguments and errors as `PromptAttention.columns`.

        Of CLIP's tokens where the columns show them, otherwise of T5's.
        """
        wanted = spelled(phrase)
        if not wanted:
            raise ValueError(f"expected a word of the prompt {self.prompt!r}, found {phrase!r}")
        found = next(filter(None, (_places(words, wanted) for words in self.segments)), [])
        if not found:
            raise ValueError(self._absent(phrase, wanted))
        if occurrence is None:
            return np.unique(np.concatenate(found))
        if occurrence not in range(len(found)):
            raise ValueError(
                f"occurrence is {occurrence}; the columns show {phrase!r} of the prompt {self.prompt!r} "
                f"{len(found)} times: expected 0 to {len(found) - 1}"
            )
        return found[occurrence]

    @property
    def spoken(self) -> list[str]:
        """The words and numbers among the columns, each once."""
        return _each_once(word.text for words in self.segments for word in words)

    def _absent(self, phrase: str, wanted: list[str]) -> str:
        said = WORD.findall(self.prompt)
        everything = [Word(text, place, place + 1) for place, text in enumerate(said)]
        if not _places(everything, wanted):
            return f"the prompt {self.prompt!r} has no {phrase!r}: {_listed('its words are', said)}"
        if len(self.pads) == self.count:
            shown_instead = "they are pads, or zeros in the place of a T5 that is not loaded"
        else:
            shown_instead = _listed("their words are", self.spoken)
        return f"{phrase!r} of the prompt {self.prompt!r} has no columns among those that are shown: {shown_instead}"


def spelled(text: str) -> list[str]:
    """The words of a text as they are compared: neither case nor how accents are encoded counts."""
    return [unicodedata.normalize("NFC", word).casefold() for word in WORD.findall(text)]


def _places(words: Sequence[Word], wanted: list[str]) -> list[Int[np.ndarray, " columns"]]:
    """Columns of each place where these words follow one another, with nothing between their tokens."""
    found = []
    for first in range(len(words) - len(wanted) + 1):
        run = words[first : first + len(wanted)]
        if [spelled(word.text) for word in run] == [[word] for word in wanted]:
            found.append(np.arange(run[0].start, run[-1].stop))
    return found


def _each_once(words: Iterable[str]) -> list[str]:
    kept: dict[tuple[str, ...], str] = {}
    for word in words:
        if word[0].isalnum():
            kept.setdefault(tuple(spelled(word)), word)
    return [*kept.values()]


def _listed(beginning: str, words: Iterable[str]) -> str:
    named = _each_once(words)
    return f"{beginning} {', '.join(named)}" if named else "there are no words"


def word_tokens(tokenizer: Tokenizer, prompt: str, length: int) -> tuple[list[Word], int]:
    """The words of a prompt with their tokens, and how many tokens come before the pads.

    Of a prompt that is too long the last tokens are lost (`text.tokenize`), and so are words that have one of them.
    """
    offsets = tokenizer(prompt, return_offsets_mapping=True, verbose=False).offset_mapping
    words = []
    for found in WORD.finditer(prompt):
        own = [place for place, (start, stop) in enumerate(offsets) if start < found.end() and found.start() < stop]
        if own and own[-1] < length - 1:  # the last token is the one that ends the prompt
            words.append(Word(found[0], own[0], own[-1] + 1))
    return words, min(len(offsets), length)


def text_columns(
    tokenizers: Tokenizers, prompt: str, segments: Sequence[tuple[str, int]], shown: tuple[int, int | None]
) -> TextColumns:
    """What the columns of a prompt are.

    CLIP's two tokenizers may split a word at different places, as one pads with the '!'; such a word has no columns.

    Args:
      segments: name and length of each part of the text, in order (`TextConditioning.segments`).
      shown: first and last (exclusive; None: to the end) of the text's tokens that are columns.
    """
    total = sum(length for _, length in segments)
    first, last = shown[0], total if shown[1] is None else min(shown[1], total)
    offset, pads, parts = 0, list[int](), []
    for name, length in segments:
        read = [word_tokens(tokenizer, prompt, length) for tokenizer in tokenizers.of(name)]
        agreed = [same[0] for same in zip(*(words for words, _ in read), strict=False) if len({*same}) == 1]
        moved = [Word(word.text, word.start + offset - first, word.stop + offset - first) for word in agreed]
        parts.append(tuple(word for word in moved if word.start >= 0 and word.stop <= last - first))
        pads += range(offset + max((tokens for _, tokens in read), default=0), offset + length)
        offset += length
    columns = tuple(place - first for place in pads if first <= place < last)
    return TextColumns(prompt, tuple(parts), columns, last - first)


@jax.tree_util.register_dataclass
@dataclass(frozen=True, kw_only=True)
class PromptAttention(JointAttention):
    """One block's joint attention on one image, and what its text columns and its image tokens are. A pytree.

    Attributes:
      text: what the text columns are. Static, as are all that follow.
      grid: rows and columns of image tokens.
      mean_heads: whether the maps were averaged over heads.
    """

    text: TextColumns = field(metadata={"static": True})
    grid: tuple[int, int] = field(metadata={"static": True})
    mean_heads: bool = field(metadata={"static": True})

    @property
    def prompt(self) -> str:
        return self.text.prompt

    @property
    def words(self) -> tuple[Word, ...]:
        """The prompt's words, numbers and other signs that are whole among the text columns, and where."""
        return tuple(word for words in self.text.segments for word in words)

    @property
    def pads(self) -> Int[np.ndarray, " columns"]:
        """Text columns of pad tokens, and of zeros in the place of a T5 that is not loaded."""
        return np.array(self.text.pads, int)

    def columns(self, word: str, *, occurrence: int | None = None) -> Int[np.ndarray, " columns"]:
        """Text columns of a word's tokens, or of several words' that follow one another.

        Words are whole: "car" is not found in "scar", but "star" is in "Star,".

        Args:
          occurrence: which, counted from 0, where the columns show it several times. Default: all.

        Raises:
          ValueError: the prompt does not say the word, or its tokens are not among the columns.
        """
        return self.text.named(word, occurrence)

    def of(self, word: str, *, occurrence: int | None = None) -> Float[Array | np.ndarray, "*images rows columns"]:
        """How much each image token attends to a word: the mean of `probs` over its tokens and over heads.

        Float32 [rows, columns]. Of records that were concatenated by the caller with their leading axis of images.
        The axis before the image tokens is that of heads, and averaged, unless `mean_heads`.
        Arguments as for `columns`.

        Raises:
          ValueError: as `columns`; or image-to-text probabilities were not requested.
        """
        if self.image_to_text is None or self.image_to_text.probs is None:
            raise ValueError(
                "a word's map is made of image-to-text probabilities, which were not requested: "
                "give AttentionRequest quadrants=('image_to_text',) and probs=True"
            )
        maps = self.image_to_text.probs[..., self.columns(word, occurrence=occurrence)].mean(axis=-1)
        maps = maps if self.mean_heads else maps.mean(axis=-2)
        maps = maps.reshape(*maps.shape[:-1], *self.grid)
        return maps[0] if maps.ndim == 3 and len(maps) == 1 else maps


def prompt_attention(
    records: dict[int, JointAttention],
    prompts: dict[int, str],
    texts: TextConditioning,
    tokenizers: Tokenizers,
    grid: tuple[int, int],
    request: AttentionRequest,
) -> dict[int, dict[int, PromptAttention]]:
    """Records of a batch as those of each image, whose arrays keep a leading axis of 1.

    Args:
      prompts: of each row of the batch, in order, under the image's place in a list.
      request: what the records were made with.
    """
    shown = request.about(texts).text_tokens
    assert not isinstance(shown, str), "the conditioning names its segments"

    def of_image(row: int, prompt: str) -> dict[int, PromptAttention]:
        own = jax.tree.map(lambda leaf: leaf[row : row + 1], records)
        text = text_columns(tokenizers, prompt, texts.segments, shown)
        about = {"text": text, "grid": grid, "mean_heads": request.mean_heads}
        return {block: PromptAttention(**vars(record), **about) for block, record in own.items()}

    return {place: of_image(row, prompt) for row, (place, prompt) in enumerate(prompts.items())}
