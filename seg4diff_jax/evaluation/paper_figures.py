"""What the paper (Seg4Diff, arXiv 2509.18096) reports of segmentation, and which of it stands beside a row of scores.

That is what it reports of the same model, measured in the same way.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any, NamedTuple

from seg4diff_jax.evaluation.options import EMPTY, OPEN_VOCABULARY, UNSUPERVISED
from seg4diff_jax.evaluation.wording import NO_WORDS
from seg4diff_jax.models.lora import IMAGE_ATTENTION, LoRAConfig
from seg4diff_jax.models.sd3.config import MMDiTConfig
from seg4diff_jax.segmentation.unsupervised_scores import UnsupervisedProtocol

if TYPE_CHECKING:
    from seg4diff_jax.evaluation.rows import Row


class Figure(NamedTuple):
    """A reported mIoU.

    Attributes:
      dataset: as `data.sets.SETS` calls it.
      method, model: SD3 is SD3-medium, SD3.5 SD3.5-medium.
      magnet: the images that MAGNET's adapters were trained on; None: without adapters.
      miou: in percent.
      source: the table.
      prompts: what the method was asked for: `present` or `all` classes; None where the paper does not say.
    """

    dataset: str
    protocol: str
    method: str
    model: str
    magnet: str | None
    miou: float
    source: str
    prompts: str | None = None

    @property
    def title(self) -> str:
        return f"{self.method}, {self.model}" + (f" + MAGNET on {self.magnet}" if self.magnet else "")


Line = tuple[str, str, str | None, tuple[float, ...]]
BY_NAMES = ("voc20", "coco-object", "context59", "ade20k150", "cityscapes19")
"""Table 1's columns. Background does not count."""
WITHOUT_NAMES = ("voc21", "context60", "coco-object", "coco-stuff27", "cityscapes19", "ade20k150")
"""Table 2's. Background is a class of the first three, `context60` what the paper calls Context59."""
TABLE_1: tuple[Line, ...] = (
    ("ProxyCLIP", "CLIP-H/14", None, (83.3, 49.8, 39.6, 24.2, 42.0)),
    ("CorrCLIP", "CLIP-H/14", None, (91.8, 52.7, 47.9, 28.8, 49.9)),
    ("DiffSegmenter", "SD1.5", None, (66.4, 40.0, 45.9, 24.2, 12.4)),
    ("iSeg", "SD1.5", None, (82.9, 57.3, 39.2, 24.2, 24.8)),
    ("Seg4Diff", "SD3", None, (89.2, 62.0, 49.0, 34.2, 26.5)),
    ("Seg4Diff", "SD3.5", None, (86.1, 57.8, 43.4, 30.7, 23.8)),
    ("Seg4Diff", "FLUX.1-dev", None, (83.1, 50.6, 38.2, 23.9, 17.1)),
    ("Seg4Diff", "SD3", "SA-1B", (89.1, 62.0, 49.1, 34.7, 25.4)),
    ("Seg4Diff", "SD3", "COCO", (89.8, 62.9, 51.2, 35.2, 26.0)),
)
TABLE_2: tuple[Line, ...] = (
    ("ReCO", "CLIP-L/14", None, (25.1, 19.9, 15.7, 26.3, 19.3, 11.2)),
    ("MaskCLIP", "CLIP-B/16", None, (38.8, 23.6, 20.6, 19.6, 10.0, 9.8)),
    ("MaskCut", "DINO-B/8", None, (53.8, 43.4, 30.1, 41.7, 18.7, 35.7)),
    ("DiffSeg", "SD1.5", None, (49.8, 48.8, 23.2, 44.2, 16.8, 37.7)),
    ("DiffCut", "SSD-1B", None, (62.0, 54.1, 32.0, 46.1, 28.4, 42.4)),
    ("Seg4Diff", "SD3", None, (54.9, 52.6, 38.5, 49.7, 24.2, 44.9)),
    ("Seg4Diff", "SD3.5", None, (52.3, 52.9, 36.8, 47.1, 24.2, 41.5)),
    ("Seg4Diff", "SD3", "SA-1B", (55.1, 52.8, 39.0, 50.8, 24.2, 45.0)),
    ("Seg4Diff", "SD3", "COCO", (56.1, 53.5, 38.8, 53.5, 24.4, 45.4)),
)


METHOD = "Seg4Diff"
NAMES_GIVEN = {METHOD: "present", "ProxyCLIP": "all", "CorrCLIP": "all"}
"""What the methods of Table 1 are asked for. The paper says that the CLIP baselines get all names, and that this is not
the same setting. Of its two diffusion baselines it does not say."""


def _figures(source: str, protocol: str, sets: tuple[str, ...], lines: tuple[Line, ...]) -> Iterator[Figure]:
    for method, model, magnet, scores in lines:
        prompts = NAMES_GIVEN.get(method) if protocol == OPEN_VOCABULARY else EMPTY
        for dataset, miou in zip(sets, scores, strict=True):
            yield Figure(dataset, protocol, method, model, magnet, miou, source, prompts)


FIGURES = (
    *_figures("Table 1", OPEN_VOCABULARY, BY_NAMES, TABLE_1),
    *_figures("Table 2", UNSUPERVISED, WITHOUT_NAMES, TABLE_2),
)


MODELS: dict[str, dict[str, Any]] = {
    "SD3": {"qk_norm": False, "dual_attention_layers": ()},
    "SD3.5": {"qk_norm": True, "dual_attention_layers": tuple(range(13))},
}
"""What tells the two medium models of the paper apart. FLUX.1-dev is not implemented."""
SIZES = {"num_layers": 24, "num_attention_heads": 24, "caption_projection_dim": 1536}
TRAINED_SIZE = 1024
MAGNET = LoRAConfig(rank=16, alpha=16.0, targets=tuple(sorted(IMAGE_ATTENTION)), blocks=None)
"""The published adapters, as `models.lora.attached` describes them."""
IMAGES = {
    "voc20": 1449,
    "voc21": 1449,
    "context59": 5104,
    "context60": 5104,
    "coco-object": 5000,
    "coco-stuff27": 5000,
    "ade20k150": 2000,
    "cityscapes19": 500,
}
"""Of the whole validation split. Of Stuff27 others score a curated 2175, and the paper does not say which it did."""
BLOCK, STEP = 9, 8
"""Of both models; the noise level is counted from the clean end of 28."""
SPLITS = ("val", "validation")
RESIZES = ("release", "paper")
"""The released code's way, and the one that the paper describes: which of them made the tables is not known."""
THRESHOLDS = (0.1, 0.035)
"""The release's: which of them made Table 2 is not known."""


def reported(
    row: Row, config: MMDiTConfig, trained_size: int, adapters: LoRAConfig | None = None
) -> tuple[Figure, ...]:
    """The paper's figures for a row of scores; none where it has none for this model, set and way of measuring.

    Of a model with adapters like MAGNET's there are two, one for each set of images that the paper trained them on: a
    file of adapters does not say which.

    Args:
      config, trained_size: of the model, which is told by them: what has been trained into weights since is not seen.
      adapters: rank, alpha, layers and blocks of the model's adapters, see `models.lora.attached`.
    """
    model = _model(config, trained_size)
    if model is None or not _measured_alike(row) or adapters not in (None, MAGNET):
        return ()
    return tuple(
        figure
        for figure in FIGURES
        if (figure.method, figure.model) == (METHOD, model)
        and (figure.dataset, figure.protocol) == (row.images.dataset, row.protocol)
        and (figure.magnet is None) == (adapters is None)
    )


def published(row: Row) -> tuple[Figure, ...]:
    """What Table 1 reports for the images of a row, of all methods of which it is known what they are asked for.

    The models and their settings are others than the row's. None where the row's images are not those of the table: the
    whole validation split, its background not scored.
    """
    images = row.images
    alike = row.protocol == OPEN_VOCABULARY and _whole(row) and images.background in (None, "asked", "ignored")
    known = lambda figure: figure.protocol == row.protocol and figure.prompts is not None
    return tuple(figure for figure in FIGURES if alike and figure.dataset == images.dataset and known(figure))


def _model(config: MMDiTConfig, trained_size: int) -> str | None:
    if trained_size != TRAINED_SIZE:
        return None
    alike = lambda marks: all(getattr(config, name) == value for name, value in (SIZES | marks).items())
    return next((name for name, marks in MODELS.items() if alike(marks)), None)


def _measured_alike(row: Row) -> bool:
    expert = (row.block, row.head, row.step) == (BLOCK, None, STEP)
    alike = _asked_alike(row) if row.merging is None else _released_match(row, row.merging)
    return _whole(row) and expert and alike and row.images.resize in RESIZES and not row.refined


def _whole(row: Row) -> bool:
    images = row.images
    every = not images.skipped and images.list is None
    every = every and images.images + images.unlabelled_images == IMAGES.get(images.dataset)
    return every and images.split in SPLITS and images.unlabelled in (None, "background")


def _asked_alike(row: Row) -> bool:
    # The release asks for the background and does not score it.
    named = row.names != "readable" and row.words == NO_WORDS and row.below is None
    return row.prompts == "present" and named and row.images.background in (None, "asked")


def _released_match(row: Row, merging: UnsupervisedProtocol) -> bool:
    made = merging.grouping == "pads" and merging.minmax == "token" and merging.threshold in THRESHOLDS
    return made and merging.match == "row" and merging.absent_classes and row.images.background in (None, "scored")
