"""The options of `evaluate.py`, and the parsing of their lists of numbers and names."""

from __future__ import annotations

import math
import re
from dataclasses import dataclass, field, fields
from typing import Any, Literal, get_type_hints

from seg4diff_jax.configuration import Parser, check_parsed, configuration_file, unchecked
from seg4diff_jax.data.names import Background, Spelling, Unlabelled
from seg4diff_jax.evaluation.option_help import HELP
from seg4diff_jax.images import Resize
from seg4diff_jax.quoting import quoted
from seg4diff_jax.segmentation.mask_options import PAPERS_MASKS, MaskOptions

EvaluationResize = Literal[Resize, "paper"]
"""How an image is brought to the model's size: as in `images.resize`, or only the square in its middle (`paper`)."""
Numbers = int | str | list[int | str]
"""A number, `2,4,8`, `0..23`, a list, or a name such as `all`."""
ListedWords = str | list[str] | None
"""`sky,wall` or a list of words; None where the option is not given."""
ALL = "all"
GRID = "grid"
"""Value of an option that stands for many thresholds: the grouping's of `segmentation.grouping.THRESHOLD_GRIDS`, or
`evaluation.background.THRESHOLD_GRID`."""
MEAN = "mean"
"""Value of `--heads` that stands for the mean of all heads of a block, and of `--background.threshold` that stands for
the mean of each map over its image."""
Threshold = float | Literal["mean"]
"""Of the background: a score, or the mean of the map."""
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
"""Figures beside mIoU, of any set."""
AVERAGE_PRECISION = "average_precision"
"""The figure beside mIoU of sets with one object in each image."""
PROTOCOLS = OPEN_VOCABULARY, UNSUPERVISED = "open_vocabulary", "unsupervised"
BATCH_TOKENS = 16384
"""Default number of image tokens per device and batch: 4 images of SD3's 1024 x 1024 pixels."""


@dataclass(frozen=True)
class Data:
    """Which images to evaluate on, and how their classes and labels are treated. See `option_help.HELP` for each."""

    name: str | None = None
    root: str | None = None
    split: str | None = None
    labels: str | None = None
    names: Spelling = "own"
    synonyms: str | None = None
    template: str = "{}"
    stop_words: ListedWords = None
    background: Background | None = None
    unlabelled: Unlabelled | None = None
    list: str | None = None
    resize: EvaluationResize = "square"
    scenes: int = 500


@dataclass(frozen=True)
class BackgroundOptions:
    """What pixels become background by, where that is not its name. See `option_help.HELP` for each option."""

    threshold: float | str | list[float] | None = None
    competitors: ListedWords = None


@dataclass(frozen=True)
class Unsupervised:
    """How unsupervised segments are made and scored, see `segmentation.unsupervised_scores.UnsupervisedProtocol`."""

    grouping: Literal["pads", "diffseg", "diffcut"] = "pads"
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
    """All options of `evaluate.py`: what to measure, and where results go. See `option_help.HELP` for each option."""

    model: str = "miniature"
    lora: str | None = None
    protocol: str | list[str] = OPEN_VOCABULARY
    data: Data = field(default_factory=Data)
    blocks: Numbers = "expert"
    heads: Numbers = MEAN
    steps: Numbers = "expert"
    seeds: Numbers = "0,1,2"
    prompts: str | list[str] = "present"
    background: BackgroundOptions = field(default_factory=BackgroundOptions)
    decoys: Decoys = field(default_factory=Decoys)
    metrics: str | list[str] | None = None
    unsupervised: Unsupervised = field(default_factory=Unsupervised)
    masks: MaskOptions = PAPERS_MASKS
    class_prior: str | None = None
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


GROUPS: dict[str, type] = {
    "data": Data,
    "background": BackgroundOptions,
    "decoys": Decoys,
    "unsupervised": Unsupervised,
    "masks": MaskOptions,
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
            if not prefix and one.name in GROUPS:  # `data.background` is an option, `background` a group
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
    values["masks"] |= {
        name: tuple(listed) for name in ("levels", "refine_heads") if (listed := values["masks"][name]) is not None
    }
    values |= {name: group(**values[name]) for name, group in GROUPS.items() if group is not MaskOptions}
    return Options(**values | {"masks": unchecked(MaskOptions, values["masks"])})  # all its problems are told at once


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
    """Returns the listed figures beside mIoU, all `METRICS` for `all`, none for None.

    Raises ValueError for anything else.
    """
    if value is None or value == []:
        return ()
    found = _each_once(value, "--metrics", (*METRICS, AVERAGE_PRECISION, ALL))
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


def thresholds(
    value: float | str | list[float], name: str, grouping: Literal["pads", "diffseg", "diffcut"] = "pads"
) -> tuple[float, ...]:
    """Returns the listed thresholds of unsupervised segments, or the grouping's whole grid for `grid`.

    Raises:
      ValueError: a threshold is not a finite number above 0, and below 1 for `diffcut`, or is listed twice.
    """
    if value == GRID:
        from seg4diff_jax.segmentation.grouping import THRESHOLD_GRIDS  # imports JAX, which takes seconds

        return THRESHOLD_GRIDS[grouping]
    if grouping == "diffcut":
        return _numbers_below(value, name, 1.0, "0.5,0.6")
    return _numbers_below(value, name, math.inf, "0.005,0.01")


def background_thresholds(value: float | str | list[float] | None) -> tuple[Threshold, ...]:
    """Returns the listed thresholds of the background, ascending, the whole grid for `grid`, or none for None.

    `mean` is a threshold by itself.

    Raises:
      ValueError: a threshold is not a number between 0 and 1, or is listed twice.
    """
    if value is None:
        return ()
    if value == MEAN:
        return (MEAN,)
    if value == GRID:
        from seg4diff_jax.evaluation.background import THRESHOLD_GRID  # imports JAX, which takes seconds

        return THRESHOLD_GRID
    return tuple(sorted(_numbers_below(value, "--background.threshold", 1.0, "0.01,0.02")))


def shown_threshold(threshold: Threshold) -> str:
    """Returns a threshold as titles have it."""
    return threshold if isinstance(threshold, str) else f"{threshold:g}"


def _numbers_below(value: float | str | list[float], name: str, most: float, example: str) -> tuple[float, ...]:
    try:
        found = tuple(float(part) for part in _parts(value))
    except ValueError:
        found = ()
    if not found or len(set(found)) < len(found) or not all(0 < each < most for each in found):
        below = "" if most == math.inf else f" and below {most:g}"
        raise ValueError(
            f"{name} is {quoted(value)}: expected numbers above 0{below}, each once, as in {example}, or {GRID}"
        )
    return found


def listed_words(value: ListedWords, name: str) -> tuple[str, ...]:
    """Returns the listed words, none for None.

    Raises:
      ValueError: no word is listed, one is blank, or one is listed twice.
    """
    if value is None:
        return ()
    found = tuple(str(part).strip() for part in _parts(value))
    if not found or not all(found) or len(set(found)) < len(found):
        raise ValueError(f"{name} is {quoted(value)}: expected at least one word, and each once, as in sky,wall")
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
