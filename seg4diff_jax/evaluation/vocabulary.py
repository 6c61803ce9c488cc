"""What images are asked for: the classes that they hold, or the whole vocabulary, and what finds the background."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import lru_cache

import numpy as np
from jaxtyping import Float

from seg4diff_jax.data.names import spelled
from seg4diff_jax.data.single_objects import BACKGROUND, CLASSES, FOREGROUND
from seg4diff_jax.evaluation.batches import Asked, Example
from seg4diff_jax.evaluation.benchmarks import Benchmark
from seg4diff_jax.evaluation.decoys import Beside, lookalikes, random_decoys
from seg4diff_jax.evaluation.options import Decoys
from seg4diff_jax.text import PLAIN, ClassPrompts, Tokenizers, Wording, worded_prompts


class Vocabulary:
    """The names of all classes, made into prompts for some of them.

    Where competitors or a threshold find the background its name is not asked for. It then has a row of scores for each
    competitor, and with a threshold a last row without words.

    Args:
      names: the names of each class.
      wording, repeats: see `text.worded_prompts`.
      background: the class that stands for all others, if competitors or a threshold find it.
      competitors: words whose pixels are background.
      by_threshold: whether pixels are background where all scores are below a threshold.
    """

    def __init__(
        self,
        tokenizers: Tokenizers,
        names: Sequence[Sequence[str]],
        wording: Wording = PLAIN,
        *,
        repeats: bool = False,
        background: int | None = None,
        competitors: Sequence[str] = (),
        by_threshold: bool = False,
    ):
        self._tokenizers, self._names, self._wording, self._repeats = tokenizers, tuple(names), wording, repeats
        self._background, self._competitors, self._by_threshold = background, tuple(competitors), by_threshold

    @classmethod
    def of(cls, benchmark: Benchmark, tokenizers: Tokenizers, *, by_threshold: bool = False) -> Vocabulary:
        """Returns the vocabulary of a benchmark, in its words."""
        words = benchmark.words
        return cls(
            tokenizers,
            words.names(benchmark.classes, benchmark.prompts),
            words.wording,
            repeats=benchmark.names == "release",
            background=benchmark.background if words.competitors or by_threshold else None,
            competitors=words.competitors,
            by_threshold=by_threshold,
        )

    def __len__(self) -> int:
        return len(self._names)

    def asked(self, classes: tuple[int, ...]) -> tuple[tuple[int, ...], ClassPrompts]:
        """Returns the class of each row of scores, and the prompts, that ask for some classes; see `batches.Asked`.

        Raises ValueError if prompts cannot be made from the names.
        """
        named = tuple(index for index in classes if index != self._background)
        names = [self._names[index] for index in named]
        if self._background is None or self._background not in classes:
            return named, self._prompts(names)
        if not named:  # an image that holds nothing else is asked for its name
            return classes, self._prompts([self._names[self._background]])
        rows = len(self._competitors) + self._by_threshold
        prompts = self._prompts([*names, *((word,) for word in self._competitors)])
        return (*named, *[self._background] * rows), prompts

    def _prompts(self, names: Sequence[Sequence[str]]) -> ClassPrompts:
        return worded_prompts(self._tokenizers, names, self._wording, repeats=self._repeats)


class PresentClasses:
    """The paper's protocol: the prompt of an image names the classes in its label map, and no others.

    Args:
      beside: chooses decoys, which are named too. Default: none are.
    """

    def __init__(self, vocabulary: Vocabulary, beside: Beside = lambda present, index: ()):
        self._asked, self._beside = lru_cache(4096)(vocabulary.asked), beside

    def __call__(self, example: Example) -> tuple[tuple[int, ...], ClassPrompts]:
        return self._asked(tuple(sorted((*example.present, *self._beside(example.present, example.index)))))


class NamedObjects:
    """Each image is asked for the name of its object, and for what finds the background, whatever its label holds.

    The row of the object is the first.

    Args:
      vocabulary: the names of all objects, then that of the background.
      places: the place of each image's object in the vocabulary.
    """

    def __init__(self, vocabulary: Vocabulary, places: Sequence[int]):
        self._asked, self._places, self._last = lru_cache(4096)(vocabulary.asked), tuple(places), len(vocabulary) - 1

    @classmethod
    def of(cls, benchmark: Benchmark, tokenizers: Tokenizers, *, by_threshold: bool = False) -> NamedObjects:
        """Asks for the objects of a benchmark, in its words."""
        words, names = benchmark.words, benchmark.object_names
        asked = [*words.names(names, spelled(names, benchmark.names)), (CLASSES[BACKGROUND],)]
        vocabulary = Vocabulary(
            tokenizers,
            asked,
            words.wording,
            repeats=benchmark.names == "release",
            background=len(names) if words.competitors or by_threshold else None,
            competitors=words.competitors,
            by_threshold=by_threshold,
        )
        place_of = {name: place for place, name in enumerate(names)}
        return cls(vocabulary, [place_of[name] for name in benchmark.objects])

    def __call__(self, example: Example) -> tuple[tuple[int, ...], ClassPrompts]:
        rows, prompts = self._asked((self._places[example.index], self._last))
        return (FOREGROUND, *[BACKGROUND] * (len(rows) - 1)), prompts


class AllClasses:
    """The prompts of every image name the whole vocabulary, in as few prompts as possible.

    Args:
      without: a class that no prompt names.
    """

    def __init__(self, vocabulary: Vocabulary, *, without: int | None = None):
        self.rows, self.prompts = vocabulary.asked(tuple(each for each in range(len(vocabulary)) if each != without))

    def __call__(self, example: Example) -> tuple[tuple[int, ...], ClassPrompts]:
        return self.rows, self.prompts


def questions(
    benchmark: Benchmark,
    tokenizers: Tokenizers,
    prompts: Sequence[str],
    *,
    by_threshold: bool = False,
    decoys: Decoys | None = None,
    likeness: Callable[[Sequence[str]], Float[np.ndarray, "classes classes"]] | None = None,
) -> dict[str, Asked]:
    """Returns the maker of prompts for each kind of prompts in `prompts`, see `options.PROMPTS`.

    Args:
      by_threshold: whether background is found by a threshold.
      decoys: how many decoys there are, and their seed. Default: the options' defaults.
      likeness: says how alike class names are. Lookalikes need it.

    Raises:
      ValueError: prompts cannot be made from the class names.
    """
    if not prompts:
        return {}
    if benchmark.objects:
        asked = NamedObjects.of(benchmark, tokenizers, by_threshold=by_threshold)
        return dict.fromkeys(prompts, asked)
    vocabulary, chosen = Vocabulary.of(benchmark, tokenizers, by_threshold=by_threshold), decoys or Decoys()
    without = benchmark.background if benchmark.rule == "ignored" else None
    allowed = [index for index in range(len(benchmark.classes)) if index != without]

    def alike() -> Beside:
        assert likeness is not None
        return lookalikes(allowed, chosen.count, likeness(benchmark.prompts))

    makers: dict[str, Callable[[], Asked]] = {
        "present": lambda: PresentClasses(vocabulary),
        "all": lambda: AllClasses(vocabulary, without=without),
        "decoys": lambda: PresentClasses(vocabulary, random_decoys(allowed, chosen.count, chosen.seed)),
        "lookalikes": lambda: PresentClasses(vocabulary, alike()),
    }
    return {name: makers[name]() for name in prompts}


def each_class_once(
    classes: Sequence[int], scores: Float[np.ndarray, "rows rows_of_tokens columns_of_tokens"]
) -> tuple[tuple[int, ...], Float[np.ndarray, "classes rows_of_tokens columns_of_tokens"]]:
    """Returns the classes of rows, each once, and the greatest score of each at every place."""
    once = tuple(dict.fromkeys(classes))
    return once, np.stack([scores[np.array(classes) == index].max(axis=0) for index in once])
