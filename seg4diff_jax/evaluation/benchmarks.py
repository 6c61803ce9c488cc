"""The benchmarks: named sources of labelled images, and groups of classes that are reported separately."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path

from seg4diff_jax.configuration import Refusals, refuse
from seg4diff_jax.convert.staging import staged_directory
from seg4diff_jax.data.folder import LabelledFolder
from seg4diff_jax.data.labelled import published_kind, published_split
from seg4diff_jax.data.loader import DataSource
from seg4diff_jax.data.names import Background, Spelling, Unlabelled, spelled
from seg4diff_jax.data.sets import SETS
from seg4diff_jax.data.subset import Named, Subset, listed_places
from seg4diff_jax.evaluation.options import (
    MEAN,
    OPEN_VOCABULARY,
    UNSUPERVISED,
    BackgroundOptions,
    Data,
    background_thresholds,
    listed_words,
)
from seg4diff_jax.evaluation.wording import NO_WORDS, Words, check_words, read_synonyms
from seg4diff_jax.miniature.world.shapes import CLASSES, STUFFS, THINGS, scene, write_folder
from seg4diff_jax.quoting import quoted
from seg4diff_jax.text import Wording

SCENE_SPLITS = ("test", "validation", "train")
OTHERS = ("tfds", "folder", "scenes")
"""Names of the sources of images other than the published sets."""
BACKGROUND = "background"
"""The class of a folder, or of a prepared set, that stands for all others. A published set says which it is."""
NO_BACKGROUND = BackgroundOptions()


@dataclass(frozen=True)
class Benchmark:
    """Labelled images whose labels are indices into `classes`, or 255.

    Attributes:
      name: the benchmark's name in results.
      source: items with `image`, `labels` and `name`.
      groups: classes whose mean IoU is reported separately, by the group's name.
      where: where the images come from, in words.
      split, kind: the part of the set and the kind of labels, where the set has several.
      background: index of the class that stands for all others; `rule` says how it is scored.
      names: how prompts spell the classes.
      words: what prompts say beside, or instead of, these names.
      unlabelled: how unlabelled pixels are treated, where a set has a choice.
      listed: the file that names the images; None: all images of the set.
      objects: what the object of each image is called, where labels are foreground and background; else none.
    """

    name: str
    classes: tuple[str, ...]
    source: DataSource
    groups: Mapping[str, Sequence[int]] = field(default_factory=dict)
    where: str = ""
    split: str = ""
    kind: str = ""
    background: int | None = None
    rule: Background = "scored"
    names: Spelling = "own"
    words: Words = NO_WORDS
    unlabelled: Unlabelled | None = None
    listed: str | None = None
    objects: tuple[str, ...] = ()

    @property
    def object_names(self) -> tuple[str, ...]:
        """The names of all objects, each once."""
        return tuple(dict.fromkeys(self.objects))

    @property
    def prompts(self) -> tuple[str, ...]:
        """The names of the classes in prompts, but for synonyms."""
        return spelled(self.classes, self.names)


def open_benchmark(
    data: Data,
    scene_size: int,
    protocols: Sequence[str] = (OPEN_VOCABULARY,),
    background: BackgroundOptions = NO_BACKGROUND,
) -> Benchmark:
    """Opens the benchmark that the options name.

    Args:
      scene_size: side of synthetic scenes, in pixels.
      background: what finds the background.
      protocols: the protocols that will be measured. Unsupervised segmentation scores the background by default.

    Raises:
      FolderError: files are missing or not as described.
      ValueError: an option does not fit the benchmark.
    """
    refuse(misfits(data, background))
    name = named(data)
    if name == "scenes":
        split = published_split(data.split, SCENE_SPLITS, "the synthetic world")
        benchmark = scenes_benchmark(data.scenes, scene_size, split)
    elif name == "folder":
        benchmark = folder_benchmark(str(data.root))
    elif name == "tfds":
        benchmark = prepared_benchmark(str(data.root), data.split, data.labels)
    else:
        benchmark = published_benchmark(name, str(data.root), data.split, data.labels, data.unlabelled)
    if data.list:
        assert isinstance(benchmark.source, Named)
        places = listed_places(data.list, benchmark.source.names, benchmark.where)
        where = f"{benchmark.where}, of {data.list}"
        objects = tuple(benchmark.objects[place] for place in places) if benchmark.objects else ()
        source = Subset(benchmark.source, places)
        benchmark = replace(benchmark, source=source, where=where, listed=data.list, objects=objects)
    if benchmark.background is None:
        refuse(_without_background(data, background, named(data)))
    benchmark = replace(benchmark, rule=_background_rule(data, benchmark, protocols), names=data.names)
    return replace(benchmark, words=_words(data, background, benchmark))


def _words(data: Data, background: BackgroundOptions, benchmark: Benchmark) -> Words:
    """Returns the words that the options name, checked against the benchmark's classes.

    Raises FolderError or ValueError for those that do not fit, and for classes that would get one name.
    """
    for name, value in asdict(background).items():
        if value is not None and benchmark.rule == "ignored":
            raise ValueError(
                f"background.{name} is {quoted(value)}, but {benchmark.name}'s background is ignored: give "
                "--data.background scored or asked"
            )
    words = Words(
        data.synonyms,
        read_synonyms(data.synonyms) if data.synonyms else {},
        Wording(data.template, listed_words(data.stop_words, "--data.stop-words")),
        listed_words(background.competitors, "--background.competitors"),
    )
    if benchmark.objects:
        classes, asked = benchmark.object_names, spelled(benchmark.object_names, benchmark.names)
        others = [name for names in words.names(classes, asked) for name in names]
        check_words(words, classes, others, benchmark.name)
        return words
    asked = words.names(benchmark.classes, benchmark.prompts)
    others = [name for index, names in enumerate(asked) if index != benchmark.background for name in names]
    check_words(words, benchmark.classes, others, benchmark.name)
    return words


def named(data: Data) -> str:
    return data.name or ("folder" if data.root else "scenes")


def misfits(data: Data, background: BackgroundOptions = NO_BACKGROUND) -> list[str]:
    """Returns a sentence for each option that does not fit. Reads no files."""
    name, refusals = named(data), Refusals()
    found = refusals.found
    if name not in (*SETS, *OTHERS):
        return [f"data.name is {name!r}: expected one of {', '.join((*SETS, *OTHERS))}"]
    if name == "scenes":
        if data.root:
            found.append(f"data.root is {data.root!r}, but scenes lie in the user's cache: leave it out")
        if data.scenes < 1:
            found.append(f"--data.scenes is {data.scenes}: expected at least 1")
        refusals.check(lambda: published_split(data.split, SCENE_SPLITS, "the synthetic world"))
    elif not data.root:
        layout = SETS[name].layout if name in SETS else "images/, labels/ and classes.txt, or a prepared set"
        found.append(f"data.name is {name!r}, but there is no data.root: give the directory with {layout}")
    if name == "folder" and data.split:
        found.append(f"data.split is {data.split!r}, but a folder has no splits: leave it out")
    if name in ("scenes", "folder"):
        refusals.check(lambda: published_kind(data.labels, (), name))
    having = [each for each, one in SETS.items() if one.unlabelled is not None]
    if data.unlabelled and name not in having:
        found.append(f"data.unlabelled is {data.unlabelled!r}, but {name} has no such pixels; {', '.join(having)} has")
    found += _of_one_object(data, background, name)
    if name == "scenes" or (name in SETS and SETS[name].background is None):
        found += _without_background(data, background, name)
    refusals.check(lambda: background_thresholds(background.threshold))
    refusals.check(lambda: listed_words(background.competitors, "--background.competitors"))
    refusals.check(lambda: listed_words(data.stop_words, "--data.stop-words"))
    refusals.check(lambda: Wording(data.template))
    return found


def single(data: Data) -> bool:
    """Whether each image of the set has one object, whose name it is asked for."""
    return named(data) in SETS and SETS[named(data)].single


def _of_one_object(data: Data, background: BackgroundOptions, name: str) -> list[str]:
    """Returns a sentence for each option that does not fit a set with one object in each image, or fits only such."""
    if not single(data):
        having = ", ".join(each for each, one in SETS.items() if one.single)
        told = f"background.threshold is {MEAN!r}, the mean of one object's map: {having} have one in each image"
        return [f"{told}, {name} has not"] if background.threshold == MEAN else []
    found = []
    if data.background not in (None, "scored"):
        found.append(f"data.background is {data.background!r}, but {name}'s is half of the score: leave it out")
    if data.resize == "paper":
        found.append(f"data.resize is 'paper', but {name}'s labels are compared whole: give square")
    return found


def _without_background(data: Data, background: BackgroundOptions, name: str) -> list[str]:
    """Returns a sentence for each option of the background of a set that has none."""
    given = {"data.background": data.background} | {
        f"background.{each}": one for each, one in asdict(background).items()
    }
    having = ", ".join(each for each, one in SETS.items() if one.background is not None and not one.single)
    return [
        f"{option} is {quoted(value)}, but {name} has no background class; {having} have, and a folder whose "
        f"classes.txt names {BACKGROUND}"
        for option, value in given.items()
        if value is not None
    ]


def _background_rule(data: Data, benchmark: Benchmark, protocols: Sequence[str]) -> Background:
    """Returns the background rule of all protocols, which count the same pixels. Raises ValueError if there is none."""
    unsupervised = UNSUPERVISED in protocols and benchmark.background is not None
    if unsupervised and data.background == "asked":
        raise ValueError("data.background is 'asked', but unsupervised asks for nothing: give scored or ignored")
    if data.background:
        return data.background
    if unsupervised and len(protocols) > 1 and benchmark.rule != "scored":
        raise ValueError(
            f"{benchmark.name}'s background is {benchmark.rule} by open_vocabulary and scored by unsupervised: give "
            "--data.background scored or ignored for both, or measure them one after the other"
        )
    return "scored" if unsupervised else benchmark.rule


def published_benchmark(
    name: str,
    root: str | Path,
    split: str | None = None,
    kind: str | None = None,
    unlabelled: Unlabelled | None = None,
) -> Benchmark:
    """Opens a set of `data.sets`, in the layout in which it is published.

    Raises:
      FolderError: files are missing or not as described.
      ValueError: the set has no such split or labels.
    """
    published = SETS[name]
    source = published.open(root, split, kind, unlabelled)
    return Benchmark(
        name,
        published.classes,
        source,
        published.groups,
        f"{name} {source.split} in {root}",
        split=source.split,
        kind=source.kind,
        background=published.background,
        rule=published.rule,
        unlabelled=None if published.unlabelled is None else unlabelled or "background",
        objects=source.objects,
    )


def prepared_benchmark(root: str | Path, split: str | None = None, kind: str | None = None) -> Benchmark:
    """Opens a set that tensorflow-datasets has prepared. Raises FolderError or ValueError when it cannot be used."""
    from seg4diff_jax.data.tfds_source import PreparedSet

    source = PreparedSet(root, split, kind)
    return Benchmark(
        source.name,
        source.classes,
        source,
        {},
        f"{source.name} {source.split} in {source.root}",
        split=source.split,
        kind=source.kind,
        background=_background_of(source.classes),
    )


def folder_benchmark(root: str | Path, name: str | None = None) -> Benchmark:
    """Opens a folder in the layout of `data.folder`. For the synthetic world, things and stuffs are separate groups.

    Raises:
      FolderError: the folder has another layout.
    """
    source = LabelledFolder(root)
    groups: dict[str, Sequence[int]] = {}
    if source.classes == CLASSES:
        groups = {"things": range(len(THINGS)), "stuffs": range(len(THINGS), len(THINGS) + len(STUFFS))}
    own, background = source.root.resolve().name, _background_of(source.classes)
    return Benchmark(name or own, source.classes, source, groups, str(source.root), background=background)


def _background_of(classes: Sequence[str]) -> int | None:
    return classes.index(BACKGROUND) if BACKGROUND in classes else None


def scenes_benchmark(count: int, size: int, split: str = "test", cache: Path | None = None) -> Benchmark:
    """Opens synthetic scenes of a split, as a folder on the disk. The folder is written first if it is absent.

    Args:
      size: side of the pictures, in pixels.
      cache: directory for such folders; default: in the user's cache.

    Raises:
      ValueError: `count` is below 1, or the size too small.
    """
    if count < 1:
        raise ValueError(f"--data.scenes is {count}: expected at least 1")
    cache = cache or Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "seg4diff-jax" / "scenes"
    root = cache / f"{split}-{count}-of-{size}-pixels-{_world(size)}"
    if not root.is_dir():
        with staged_directory(root) as work:
            write_folder(work, (scene(split, index, size) for index in range(count)))
    return folder_benchmark(root, f"synthetic {split} scenes ({size} px)")


def _world(size: int) -> str:
    """Returns a hash that changes when the synthetic world changes, so that folders of older scenes are not used."""
    digest = hashlib.sha256()
    for index in range(4):
        shown = scene("test", index, size)
        digest.update(shown.image.tobytes() + shown.labels.tobytes())
    return digest.hexdigest()[:8]
