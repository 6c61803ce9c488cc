"""The options of `evaluate.py`, and the parsing of their lists of numbers and names."""

from __future__ import annotations

import re
from dataclasses import dataclass, field, fields
from typing import Any, Literal, get_type_hints

from seg4diff_jax.configuration import Parser, check_parsed, configuration_file
from seg4diff_jax.data.names import Background, Spelling, Unlabelled
from seg4diff_jax.images import Resize
from seg4diff_jax.quoting import quoted

EvaluationResize = Literal[Resize, "paper"]
"""How an image is brought to the model's size: as in `images.resize`, or only the square in its middle (`paper`)."""
Numbers = int | str | list[int | str]
"""A number, `2,4,8`, `0..23`, a list, or a name such as `all`."""
ALL = "all"
GRID = "grid"
"""Value of an option that stands for all thresholds of `segmentation.unsupervised.THRESHOLD_GRID`."""
MEAN = "mean"
"""Value of `--heads` that stands for the mean of all heads of a block."""
STEPS = range(1, 29)
PROMPTS = ("present", "all", "decoys", "lookalikes")
"""Kinds of prompts: an image's own classes; the whole vocabulary; its own with others by seed, or by likeness."""
WITH_ABSENT = PROMPTS[1:]
"""Kinds of prompts that ask for classes that an image does not have."""
WITH_DECOYS = PROMPTS[2:]
"""Those that ask for a chosen few of them."""
EMPTY = "empty"
"""The kind of prompt of the unsupervised protocol."""
ASKED = {
    "present": "present classes",
    "all": "all classes",
    "decoys": "present classes and decoys",
    "lookalikes": "present classes and lookalikes",
    EMPTY: "no names",
}
"""What is asked for, in words, by kind of prompt."""
METRICS = PRESENCE, BOUNDARY, POINTING = "presence", "boundary", "pointing"
"""Figures beside mIoU."""
PROTOCOLS = OPEN_VOCABULARY, UNSUPERVISED = "open_vocabulary", "unsupervised"
BATCH_TOKENS = 16384
"""Default number of image tokens per device and batch: 4 images of SD3's 1024 x 1024 pixels."""


@dataclass(frozen=True)
class Data:
    """Which images to evaluate on, and how their classes and labels are treated. See `HELP` for each option."""

    name: str | None = None
    root: str | None = None
    split: str | None = None
    labels: str | None = None
    names: Spelling = "own"
    background: Background | None = None
    unlabelled: Unlabelled | None = None
    list: str | None = None
    resize: EvaluationResize = "square"
    scenes: int = 500


@dataclass(frozen=True)
class Unsupervised:
    """How unsupervised segments are made and scored, see `segmentation.unsupervised_scores.UnsupervisedProtocol`."""

    threshold: float | str | list[float] | None = None
    minmax: Literal["pixel", "token"] = "pixel"
    match: Literal["image", "row"] = "image"
    absent_classes: bool = False


@dataclass(frozen=True)
class Decoys:
    """Classes that an image does not have and is asked for, see `decoys`."""

    count: int = 4
    seed: int = 0


@dataclass(frozen=True)
class Options:
    """All options of `evaluate.py`: what to measure, and where results go. See `HELP` for each option."""

    model: str = "miniature"
    lora: str | None = None
    protocol: str | list[str] = OPEN_VOCABULARY
    data: Data = field(default_factory=Data)
    blocks: Numbers = "expert"
    heads: Numbers = MEAN
    steps: Numbers = "expert"
    seeds: Numbers = "0,1,2"
    prompts: str | list[str] = "present"
    decoys: Decoys = field(default_factory=Decoys)
    metrics: str | list[str] | None = None
    unsupervised: Unsupervised = field(default_factory=Unsupervised)
    batch_size: int | None = None
    dtype: Literal["float32", "bfloat16"] | None = None
    skip_unreadable: bool = False
    pictures: int = 12
    out: str | None = None
    overwrite: bool = False
    resume: bool = False
    shard_batches: int = 8
    distributed: bool = False
    name_expert: bool = False


GROUPS: dict[str, type] = {"data": Data, "decoys": Decoys, "unsupervised": Unsupervised}

HELP = {
    "model": "miniature, a directory, a single file, or a Hub id",
    "lora": "adapters for the transformer: a file or directory of any format that `seg4diff convert lora` reads",
    "protocol": (
        "open_vocabulary: classes by their names; unsupervised: segments without names, matched with classes; "
        "open_vocabulary,unsupervised: both, reported apart"
    ),
    "data.name": (
        "voc20, voc21, context59, context60, coco-object, coco-stuff27, coco-171, ade20k150, cityscapes19, "
        "cityscapes27, tfds, "
        "folder or scenes; default: folder if there is a --data.root, else scenes, which are synthetic"
    ),
    "data.root": "directory with the set as it is handed out; of a folder: with images/, labels/ and classes.txt",
    "data.split": "part of the set; default: the one that results are reported on",
    "data.labels": (
        "which labels, where a set has several: SegmentationClass or SegmentationClassAug, stuffthingmaps or panoptic, "
        "labelIds or labelTrainIds; of tfds the field; default: the first that is there"
    ),
    "data.names": (
        "how prompts spell classes: own, as the set does; readable, `dining table`, without suffixes; release, cut at "
        "the first '-'"
    ),
    "data.background": (
        "of voc21, context60 and coco-object: scored as a class, ignored, or asked for without being scored, as the "
        "release does with coco-object; default: the set's rule"
    ),
    "data.unlabelled": (
        "what pixels of coco-object are that nobody labelled: background, as others convert it (default), or ignored"
    ),
    "data.list": "a file with names of images, one a line: these alone are read, in its order",
    "data.resize": (
        "how images come to the size that the model sees: square, straight to it, antialiased; release, as the release "
        "does it, by way of a shorter side of 640 pixels; aspect, to as many pixels in the nearest of 11 common aspects"
        "; paper, the square in the middle alone: what is cut off is not scored, and reported"
    ),
    "data.scenes": "how many synthetic scenes; they are written to the user's cache if they are not there",
    "blocks": "expert (the checkpoint's own), all, 9, 2,5,9 or 0..23: all come from one pass",
    "heads": "whose attention is read: mean (of all heads), all (each by itself), 3, 0..5 or mean,all",
    "steps": "expert (the checkpoint's own), 8, 2,4,8 or all of 1 (nearly clean) to 28 (pure noise); a pass each",
    "seeds": "of the noise; a pass each, averaged in the tables",
    "prompts": (
        "present: each image is asked for the classes that it has, as in the paper; all: for the whole vocabulary; "
        "decoys: for its own and some that it has not, at random; lookalikes: for its own and those most like them; "
        "present,all: both, reported apart"
    ),
    "decoys.count": "how many classes that it has not an image is asked for, with --prompts decoys or lookalikes",
    "decoys.seed": "of decoys at random: an image has the same ones whatever the noise",
    "metrics": (
        "figures beside mIoU, or all; presence: how well maps tell which classes are there, for prompts that name "
        "absent ones; boundary: IoU of what lies near the edges of masks; pointing: how often a map's highest point "
        "lies on its class; default: none"
    ),
    "unsupervised.threshold": (
        "maps merge whose divergence is below it; 0.035,0.1 scores both, grid 23 of 0.0001..0.2; default: the one of "
        "the minmax"
    ),
    "unsupervised.minmax": "what maps are brought to 0..1 over: pixel, each its pixels; token, as in the release",
    "unsupervised.match": "what is matched by itself: image; row of pixels, as in the release, which scores higher",
    "unsupervised.absent_classes": "classes that are not there take part in the match, as in the release",
    "batch_size": (
        "images, and prompts, at a time, over all devices of a process; default: on each as many as have 16384 image "
        "tokens, and no more than the set has"
    ),
    "dtype": "of parameters and computation; default: float32 on a CPU, else bfloat16",
    "skip_unreadable": "leave out images that cannot be read or have no usable label, and say so",
    "pictures": "images on the page: the best, the worst and some at random",
    "out": "directory for results; default: runs/evaluate/TIME",
    "overwrite": "replace the results of an earlier run in --out",
    "resume": "go on with the interrupted run in --out, if there is one",
    "shard_batches": "batches after which what was counted is saved, for --resume",
    "distributed": (
        "this is one process of several: they find each other through the cluster, or through "
        "JAX_COORDINATOR_ADDRESS, JAX_NUM_PROCESSES and JAX_PROCESS_ID"
    ),
    "name_expert": "write the best block and noise level into the checkpoint's configuration, as its own from then on",
}


def make_parser() -> Parser:
    """Makes the parser. Options have dashes on the command line and underscores in configuration files.

    Unknown options are refused in both.
    """
    parser = Parser(
        prog="evaluate.py",
        description="Score zero-shot segmentation, by names or without, on a set of labelled images.",
        allow_abbrev=False,
    )
    add: Any = parser.add_argument
    add(
        "--config",
        action=configuration_file(Options),
        help="YAML file, such as an earlier run's config.yaml; options after it win",
    )
    for prefix, options in (("", Options), *((f"{name}.", group) for name, group in GROUPS.items())):
        types = get_type_hints(options)
        for one in fields(options):
            if one.name in GROUPS:
                continue
            kind = {"action": "store_true"} if types[one.name] is bool else {"type": types[one.name]}
            name = prefix + one.name
            add(f"--{name.replace('_', '-')}", default=one.default, help=HELP[name], **kind)
    return parser


def parse(arguments: list[str]) -> Options:
    """Parses the arguments.

    Raises:
      SystemExit: an option is unknown or has a wrong value; the message is on stderr.
      ValueError: an option is null, or a number is NaN or infinite, where that is not allowed.
    """
    values: dict[str, Any] = make_parser().parse_args(arguments).as_dict()
    values.pop("config", None)
    check_parsed(values, Options)
    values |= {name: group(**values[name]) for name, group in GROUPS.items()}
    return Options(**values)


def numbers(value: Numbers, name: str, allowed: range, *, all_allowed: bool = True) -> tuple[int, ...]:
    """Returns the numbers that an option lists, in order.

    Args:
      allowed: the allowed numbers, for which `all` stands too.

    Raises:
      ValueError: the option lists something else, nothing, or a number twice.
    """
    if all_allowed and value == ALL:
        return tuple(allowed)
    found: list[int] = []
    for part in _parts(value):
        span = re.fullmatch(r"\s*(\d+)(?:\s*\.\.\s*(\d+))?\s*", str(part))
        if span is None:
            everything = ", or all" if all_allowed else ""
            raise ValueError(f"{name} is {quoted(value)}: expected numbers, as in 8 or 2,4,8 or 0..23{everything}")
        found += range(int(span[1]), int(span[2] or span[1]) + 1)
    wrong = [number for number in found if number not in allowed]
    if wrong:
        raise ValueError(f"{name} is {quoted(value)}: {wrong[0]} is not one of {allowed[0]}..{allowed[-1]}")
    if not found or len(set(found)) < len(found):
        raise ValueError(f"{name} is {quoted(value)}: expected at least one number, and each once")
    return tuple(found)


def kinds_of_prompts(value: str | list[str]) -> tuple[str, ...]:
    """Returns the listed kinds of `PROMPTS`, in the order given. Raises ValueError for anything else."""
    return _each_once(value, "--prompts", PROMPTS)


def metrics(value: str | list[str] | None) -> tuple[str, ...]:
    """Returns the listed `METRICS`, all of them for `all`, none for None. Raises ValueError for anything else."""
    if value is None or value == []:
        return ()
    found = _each_once(value, "--metrics", (*METRICS, ALL))
    return METRICS if ALL in found else found


def protocols(value: str | list[str]) -> tuple[str, ...]:
    """Returns `open_vocabulary`, `unsupervised` or both, in the order given. Raises ValueError for anything else."""
    return _each_once(value, "--protocol", PROTOCOLS)


def _each_once(value: str | list[str], name: str, known: tuple[str, ...]) -> tuple[str, ...]:
    kinds = tuple(kind.strip() for kind in _parts(value))
    if not kinds or set(kinds) - set(known) or len(set(kinds)) < len(kinds):
        raise ValueError(
            f"{name} is {quoted(value)}: expected {', '.join(known)}, or several of them, each once, as in "
            f"{','.join(known[:2])}"
        )
    return kinds


def _parts(value: Any) -> list[Any]:
    if isinstance(value, list):
        return value
    return str(value).split(",")


def thresholds(value: float | str | list[float], name: str) -> tuple[float, ...]:
    """Returns the listed thresholds, or the whole grid for `grid`.

    Raises:
      ValueError: a threshold is not a finite number above 0, or is listed twice.
    """
    if value == GRID:
        from seg4diff_jax.segmentation.unsupervised import THRESHOLD_GRID  # imports JAX, which takes seconds

        return THRESHOLD_GRID
    try:
        found = tuple(float(part) for part in _parts(value))
    except ValueError:
        found = ()
    if not found or len(set(found)) < len(found) or not all(0 < each < float("inf") for each in found):
        raise ValueError(f"{name} is {quoted(value)}: expected numbers above 0, each once, as in 0.005,0.01, or {GRID}")
    return found


def chosen_heads(value: Numbers, heads: int) -> tuple[int | None, ...]:
    """Returns the heads of a block to read, in the order given; None is the mean of all heads.

    Raises:
      ValueError: the model has no such heads, or one is listed twice.
    """
    found: list[int | None] = []
    for part in _parts(value):
        found += [None] if str(part).strip() == MEAN else numbers(str(part).strip(), "--heads", range(heads))
    if len(set(found)) < len(found):
        raise ValueError(f"--heads is {quoted(value)}: expected each once")
    return tuple(found)
