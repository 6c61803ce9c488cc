"""Tokenizes prompts, and packs class names into prompts with known token spans. All of it runs on the host."""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
from jaxtyping import Float, Int

from seg4diff_jax.models.encoders import TokenIds

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase as Tokenizer
else:
    Tokenizer = Any  # importing transformers takes seconds: left until a tokenizer is loaded


class Tokenizers(NamedTuple):
    """The tokenizers of a checkpoint. The two CLIP tokenizers have the same vocabulary but different pad tokens."""

    clip_l: Tokenizer
    clip_g: Tokenizer
    t5: Tokenizer | None = None

    def of(self, segment: str) -> tuple[Tokenizer, ...]:
        """Those whose tokens make up a part of the text, `clip` or `t5`; none where zeros stand in its place."""
        return {"clip": self[:2], "t5": () if self.t5 is None else (self.t5,)}[segment]


class TokenSpan(NamedTuple):
    """The tokens `start` to `stop` (exclusive) of a prompt. The start token is token 0."""

    start: int
    stop: int


def load_tokenizers(place: str | Path | Mapping[str, Path], *, t5: bool = False) -> Tokenizers:
    """Loads a checkpoint's tokenizers in diffusers' layout: `tokenizer`, `tokenizer_2` and, if `t5`, `tokenizer_3`.

    Args:
      place: the directory that holds folders of these names, or a mapping from each name to its folder.

    Raises:
      FileNotFoundError: a directory or a vocabulary is absent.
      ValueError: a tokenizer cannot be read, names no prompt length, or the two CLIP tokenizers name different lengths.
    """

    names = ("tokenizer", "tokenizer_2", "tokenizer_3")
    folders = place if isinstance(place, Mapping) else {name: Path(place) / name for name in names}
    clip_l, clip_g = (load_tokenizer(name, folders[name]) for name in names[:2])
    for name, tokenizer in (("tokenizer", clip_l), ("tokenizer_2", clip_g)):
        if tokenizer.model_max_length > 10**6:  # transformers' stand-in for an absent value is 1e30
            raise ValueError(
                f"{folders[name]}/tokenizer_config.json names no model_max_length: expected the number of positions "
                "of the text encoder (77 for SD3); add it to the file"
            )
    if clip_l.model_max_length != clip_g.model_max_length:
        raise ValueError(
            f"{folders['tokenizer']} and {folders['tokenizer_2']}: expected one model_max_length, found "
            f"{clip_l.model_max_length} and {clip_g.model_max_length}; correct their tokenizer_config.json"
        )
    if not t5:
        return Tokenizers(clip_l, clip_g)
    return Tokenizers(clip_l, clip_g, load_tokenizer("tokenizer_3", folders["tokenizer_3"]))


def load_tokenizer(name: str, directory: Path) -> Tokenizer:
    """Loads one tokenizer. `name` is its folder in diffusers' layout, such as `tokenizer_3` for T5's.

    Raises as `load_tokenizers` does.
    """
    import transformers

    t5 = name == "tokenizer_3"
    cls: Any = transformers.T5Tokenizer if t5 else transformers.CLIPTokenizer
    choices = ("tokenizer.json",), (("spiece.model",) if t5 else ("vocab.json", "merges.txt"))
    # Without a vocabulary, transformers silently makes an empty tokenizer.
    if not any(all((directory / file).is_file() for file in files) for files in choices):
        wanted = " or ".join(" with ".join(files) for files in choices)
        raise FileNotFoundError(
            f"{directory} holds no tokenizer: expected {wanted}; "
            "copy it from the checkpoint that the weights come from, or load without T5 if it is T5's that is absent"
        )
    try:
        tokenizer = cls.from_pretrained(directory, local_files_only=True)
        problem = _problem(tokenizer)
    except (KeyboardInterrupt, SystemExit):
        raise
    except (
        BaseException
    ) as error:  # the tokenizers library raises bare Exceptions, and panics, which are BaseExceptions
        reason = " ".join(str(error).split())[:200] or type(error).__name__
        raise ValueError(f"{directory} cannot be read as a {cls.__name__}: {reason}; copy it anew") from error
    if problem:
        raise ValueError(f"{directory} cannot be read as a {cls.__name__}: {problem}; copy it anew")
    return tokenizer


def _problem(tokenizer: Any) -> str | None:
    """Returns what is wrong with a loaded tokenizer, or None. Some damage shows only when words are tokenized."""
    length, ids = tokenizer.model_max_length, list(tokenizer.get_vocab().values())
    if type(length) is not int or length < 3:
        return f"model_max_length is {length!r}, expected a whole number, at least 3"
    if len(set(ids)) < len(ids):
        return "two tokens of its vocabulary have one id"
    ends = {"pad_token": tokenizer.pad_token_id, "eos_token": tokenizer.eos_token_id}
    if missing := [name for name, number in ends.items() if number not in ids]:
        return f"its {' and '.join(missing)} {'is' if len(missing) == 1 else 'are'} not in the vocabulary"
    for prompt in ("", "a photo, of 2 cats"):
        found = tokenizer([prompt], verbose=False).input_ids[0]
        if not found or found[-1] != tokenizer.eos_token_id or not set(found) <= set(ids):
            return f"the tokens of {prompt!r} are {found}, which do not end with eos_token"
        if prompt and len({*found} - {*ends.values()}) < 2:
            return f"it has one token, {found[0]}, for all words"
    return None


def tokenize(tokenizers: Tokenizers, prompts: Sequence[str], *, t5_length: int = 256) -> TokenIds:
    """Tokenizes prompts. CLIP's ids are padded to the CLIP tokenizers' length, and T5's to `t5_length`.

    The ids equal those of diffusers' StableDiffusion3Pipeline with `max_sequence_length=t5_length`. A prompt that is
    too long loses its last tokens but keeps its end token, and a warning says what was lost.

    Raises:
      TypeError: `prompts` is one string.
      ValueError: there are no prompts.
    """
    _check_prompts(prompts)
    length = tokenizers.clip_l.model_max_length
    return TokenIds(
        _padded_ids(tokenizers.clip_l, prompts, length, "CLIP-L"),
        _padded_ids(tokenizers.clip_g, prompts, length, "CLIP-bigG"),
        None if tokenizers.t5 is None else _padded_ids(tokenizers.t5, prompts, t5_length, "T5"),
    )


def tokenize_clip(tokenizer: Tokenizer, prompts: Sequence[str], length: int) -> Int[np.ndarray, "prompts tokens"]:
    """Tokenizes prompts for one CLIP, and pads their ids to `length`. Raises and warns as `tokenize` does."""
    _check_prompts(prompts)
    return _padded_ids(tokenizer, prompts, length, "CLIP")


def _check_prompts(prompts: Sequence[str]) -> None:
    if isinstance(prompts, str):
        raise TypeError(f"expected a list of prompts, found the string {prompts!r}; write [{prompts!r}]")
    if not prompts:
        raise ValueError('expected at least one prompt, found none; for no text write [""]')


def _padded_ids(
    tokenizer: Tokenizer, prompts: Sequence[str], length: int, encoder: str
) -> Int[np.ndarray, "batch tokens"]:
    padded = np.full((len(prompts), length), tokenizer.pad_token_id, np.int32)
    # Padding and cutting are done here: the tokenizers' own padding and cutting keep state, which threads would share.
    for row, prompt, ids in zip(padded, prompts, tokenizer(list(prompts), verbose=False).input_ids, strict=True):
        if len(ids) > length:
            lost = str(tokenizer.decode(ids[length - 1 : -1], clean_up_tokenization_spaces=False))
            warnings.warn(
                f"prompt {_shortened(prompt)} has {len(ids)} tokens and {encoder} takes {length}: "
                f"it does not see {_shortened(lost)}",
                stacklevel=3,
            )
            ids = [*ids[: length - 1], ids[-1]]
        row[: len(ids)] = ids
    return padded


def _shortened(text: str, length: int = 80) -> str:
    return repr(text if len(text) <= length else text[: length - 3] + "...")


@dataclass(frozen=True)
class Wording:
    """What prompts hold beside names of classes. Scores are read from the tokens of the names alone.

    Attributes:
      template: text around each name; `{}` stands for the name, as in `a photo of {}`.
      stop_words: words at the end of each prompt. They draw attention away from the names, and win no pixel.
    """

    template: str = "{}"
    stop_words: tuple[str, ...] = ()

    def __post_init__(self):
        if self.template.count("{}") != 1:
            raise ValueError(f"the template is {self.template!r}: expected {{}} in it once, as in 'a photo of {{}}'")

    def prompt(self, names: Sequence[str]) -> str:
        """Returns the prompt of some names: each in the template, then the stop words, joined by one space."""
        return " ".join([*(self.template.replace("{}", name) for name in names), *self.stop_words])

    def tokens(self, tokenizer: Tokenizer) -> tuple[list[int], list[int], list[int]]:
        """Returns the token ids before and after each name, and those of the stop words.

        Raises ValueError if one of them starts or ends a prompt.
        """
        texts = [*self.template.split("{}"), " ".join(self.stop_words)]
        before, after, end = tokenizer(texts, add_special_tokens=False, verbose=False).input_ids
        if _holds_an_end(tokenizer, [*before, *after, *end]):
            raise ValueError(f"{self.prompt(['{}'])!r} holds a token that starts or ends a prompt; leave it out")
        return before, after, end


PLAIN = Wording()  # the paper's: names alone


@dataclass(frozen=True)
class ClassPrompts:
    """Names of classes packed into prompts, and the place of each name's tokens.

    Name n has the tokens `spans[n]` of `prompts[prompt_of_name[n]]`, and is a name of class `class_of_name[n]`, whose
    first name is in `classes`. The names of a prompt are consecutive. A prompt has `length` tokens, special tokens and
    padding included.
    """

    classes: tuple[str, ...]
    prompts: tuple[str, ...]
    class_of_name: tuple[int, ...]
    prompt_of_name: tuple[int, ...]
    spans: tuple[TokenSpan, ...]
    length: int

    def averaging(self, classes: int | None = None) -> Float[np.ndarray, "prompts classes tokens"]:
        """Returns the weights that turn the prompts' image-to-text maps into the scores of all classes, in order.

        With `maps` [prompts, image tokens, tokens] the scores [classes, image tokens] are

            einsum("pnt,pct->cn", maps, averaging)

        at the highest precision. A class's score is the mean over its names of the mean over the name's tokens, each in
        the prompt that holds the name. In prompts without a name of class c, row c is zero.

        Args:
          classes: number of rows; a fixed number lets one compiled program serve class lists of any length. Rows past
            the last class are zero in every prompt, and so are their scores: leave them out of an arg-max.

        Raises:
          ValueError: there are more classes than rows.
        """
        rows = len(self.classes) if classes is None else classes
        if rows < len(self.classes):
            raise ValueError(f"{len(self.classes)} classes do not fit in classes={rows} rows")
        weights = np.zeros((len(self.prompts), rows, self.length), np.float32)
        names = np.bincount(self.class_of_name)
        for row, prompt, span in zip(self.class_of_name, self.prompt_of_name, self.spans, strict=True):
            weights[prompt, row, span.start : span.stop] = 1 / (names[row] * (span.stop - span.start))
        return weights


def class_prompts(tokenizers: Tokenizers, names: Sequence[str], *, repeats: bool = False) -> ClassPrompts:
    """Packs class names, whole and in order, into the fewest prompts, of balanced length (see `balanced_groups`).

    One space joins the names in a prompt. Lengths are counted in CLIP tokens, since masks are read from them alone.

    Args:
      repeats: allow several classes with one name. The release needs this: it cuts `wall-brick` to `wall`. Each class
        has tokens of its own all the same.

    Raises:
      TypeError: `names` is one string.
      ValueError: there is no name; or a name is blank, is repeated, is longer than a prompt, holds a special token, has
        other tokens beside its neighbours than alone, or has a different number of tokens for the two CLIP tokenizers.
    """
    _check_names(names)
    return worded_prompts(tokenizers, [(name,) for name in names], repeats=repeats)


def worded_prompts(
    tokenizers: Tokenizers, classes: Sequence[Sequence[str]], wording: Wording = PLAIN, *, repeats: bool = False
) -> ClassPrompts:
    """Packs classes of one or more names each, as `class_prompts` does, with other words beside the names.

    Raises as `class_prompts` does, and ValueError if a class has no name, or the other words leave no room for one.
    """
    if wrong := [each for each in classes if isinstance(each, str) or not each]:
        raise ValueError(f"the names of a class are {wrong[0]!r}: expected a list of one or more")
    names = [name for each in classes for name in each]
    class_of_name = [index for index, each in enumerate(classes) for _ in each]
    before, after, end = wording.tokens(tokenizers.clip_l)
    around = len(before) + len(after)
    counts = [around + len(ids) for ids in _name_ids(tokenizers.clip_l, names, repeats)]
    length = tokenizers.clip_l.model_max_length
    room = length - 2 - len(end)  # the start and the end token
    for name, count in zip(names, counts, strict=True):
        if count > room:
            beside = "" if wording == PLAIN else f" beside the other words of {_shortened(wording.prompt(['{}']))}"
            own, left = count - around, f"{max(0, room - around)}{beside}"
            raise ValueError(f"class name {_shortened(name)} has {own} tokens, a prompt room for {left}; shorten it")
    prompts, prompt_of_name, spans = [], [], []
    for number, run in enumerate(balanced_groups(counts, room)):
        group = names[run]
        spans_l, spans_g = (token_spans(each, group, wording, repeats=repeats) for each in tokenizers[:2])
        for name, span, span_g in zip(group, spans_l, spans_g, strict=True):
            if span != span_g:
                raise ValueError(
                    f"class name {name!r} is {span.stop - span.start} tokens for tokenizer and "
                    f"{span_g.stop - span_g.start} for tokenizer_2: their states could not be paired; "
                    "a '!' is the usual cause, as the second one pads with it: leave it out"
                )
        prompts.append(wording.prompt(group))
        prompt_of_name += [number] * len(group)
        spans += spans_l
    first = tuple(each[0] for each in classes)
    return ClassPrompts(first, tuple(prompts), tuple(class_of_name), tuple(prompt_of_name), tuple(spans), length)


def balanced_groups(counts: Sequence[int], room: int) -> list[slice]:
    """Splits a list of sizes, in order, into the fewest runs that each sum to at most `room`.

    Of such splits it takes those whose largest sum is smallest. Of these it takes the one whose first run is longest,
    then its second, and so on. The list must not be empty, and no size may exceed `room`.
    """

    def fill(limit: int) -> list[slice]:
        groups, start, total = [], 0, 0
        for index, count in enumerate(counts):
            if total + count > limit:
                groups.append(slice(start, index))
                start, total = index, 0
            total += count
        return [*groups, slice(start, len(counts))]

    fewest = len(fill(room))
    low, high = max(counts), room
    while low < high:
        middle = (low + high) // 2
        low, high = (low, middle) if len(fill(middle)) == fewest else (middle + 1, high)
    return fill(high)


def token_spans(
    tokenizer: Tokenizer, names: Sequence[str], wording: Wording = PLAIN, *, repeats: bool = False
) -> tuple[TokenSpan, ...]:
    """Returns the place of each name's tokens in the prompt of these names (`Wording.prompt`).

    A span has as many tokens as the name has alone. Without other words the spans follow one another, and the first
    begins at token 1, after the start token (Seg4Diff). The whole prompt is tokenized as a check: CLIP's tokenizer
    never joins what a space separates, but a token that was added to the vocabulary may hold a space, and a template
    may touch the name. The prompt may be longer than the tokenizer's length, which is not checked here.

    Raises:
      TypeError: `names` is one string.
      ValueError: there is no name; or a name is blank, is repeated (as the tokenizer sees it: `Cat` repeats `cat`), or
        holds a special token; or the prompt's tokens are not those of its parts, one after the other.
    """
    before, after, _ = wording.tokens(tokenizer)
    prompt, start = wording.prompt(names), 1
    joined = tokenizer([prompt], verbose=False).input_ids[0]
    spans = []
    for name, own in zip(names, _name_ids(tokenizer, names, repeats), strict=True):
        parts = [*before, *own, *after]
        if joined[start : start + len(parts)] != parts:
            beside = "its neighbours" if wording == PLAIN else f"the words of {wording.template!r}"
            hint = "" if wording == PLAIN else "put spaces around {}, or "
            raise ValueError(
                f"class name {name!r} is split into other tokens beside {beside} than alone, so its place in the "
                f"prompt {_shortened(prompt)} is unknown; {hint}rename it, or remove the tokens added to the tokenizer "
                "that hold a space"
            )
        spans.append(TokenSpan(start + len(before), start + len(before) + len(own)))
        start += len(parts)
    return tuple(spans)


def _check_names(names: Sequence[str]) -> None:
    """Raises TypeError or ValueError for what is no list of at least one string."""
    if isinstance(names, str):
        raise TypeError(f"expected a list of class names, found the string {names!r}; write {names.split() or [names]}")
    if not isinstance(names, Sequence):
        raise TypeError(f"expected a list of class names, in order, found a {type(names).__name__}")
    if not names:
        raise ValueError("the list of class names is empty: expected at least one name")
    if other := [name for name in names if not isinstance(name, str)]:
        raise TypeError(f"expected class names that are strings, found {other[0]!r}")


def _name_ids(tokenizer: Tokenizer, names: Sequence[str], repeats: bool = False) -> list[list[int]]:
    """Returns the token ids of each name. Raises ValueError for names that could not be told apart in a prompt."""
    _check_names(names)
    rows = tokenizer(list(names), add_special_tokens=False, verbose=False).input_ids
    seen: dict[tuple[int, ...], str] = {}
    for index, (name, ids) in enumerate(zip(names, rows, strict=True)):
        if not ids or not name.strip():
            raise ValueError(f"class name {index} is blank ({name!r}): expected a word")
        if _holds_an_end(tokenizer, ids):
            raise ValueError(f"class name {name!r} holds a token that starts or ends a prompt; rename it")
        if tuple(ids) in seen and not repeats:
            other = seen[tuple(ids)]
            same = "" if other == name else f": to the text encoder it is {other!r}"
            raise ValueError(f"class name {name!r} is repeated{same}; give each class a name of its own")
        seen[tuple(ids)] = name
    return rows


def _holds_an_end(tokenizer: Tokenizer, ids: Sequence[int]) -> bool:
    return tokenizer.bos_token_id in ids or tokenizer.eos_token_id in ids
