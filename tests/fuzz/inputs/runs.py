"""What our own runs leave and read again: checkpoints, logs, caches, counts, records; and what starts them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import jax
import numpy as np

from seg4diff_jax.class_priors import read_class_prior, write_class_prior
from seg4diff_jax.command_line import compare, perturbation
from seg4diff_jax.command_line.picture_directory import RECORD, read_pictures, remove_former
from seg4diff_jax.command_line.train import parse
from seg4diff_jax.data.record_cache import RecordCache, write_cache
from seg4diff_jax.evaluation import options as evaluation
from seg4diff_jax.evaluation.batches import LeftOut
from seg4diff_jax.evaluation.counts import Counts
from seg4diff_jax.evaluation.further import FurtherCounts
from seg4diff_jax.evaluation.resumption import Progress
from seg4diff_jax.evaluation.unsupervised import SegmentCounts
from seg4diff_jax.evaluation.wording import read_synonyms
from seg4diff_jax.evaluation.zero_shot import ConfusionCounts
from seg4diff_jax.images import read_image
from seg4diff_jax.interrupted_runs import RUN
from seg4diff_jax.reproduction import run
from seg4diff_jax.reproduction.parts import Part, Step
from seg4diff_jax.segmentation.class_prior import ClassPrior
from seg4diff_jax.training.checkpoints import Checkpoints
from seg4diff_jax.training.logs import Logs
from seg4diff_jax.training.loop import train
from seg4diff_jax.training.state import TrainState
from tests.fuzz.reader import OWN_ERRORS, Reader
from tests.reference.small_training import OPTIMIZER, make_task
from tests.reference.small_training import make_run as run_of

IDENTITY = {"model": "miniature", "size": [64, 64], "seeds": [0, 1]}
STEPS = 4
IMAGES_PER_SHARD, SHARDS = 3, 2


def make_state() -> TrainState:
    normal = np.random.default_rng(0).normal
    weights = {"up.kernel": normal(size=(32, 64)).astype(np.float32), "up.bias": normal(size=8).astype(np.float32)}
    moments = {name: array * 0.1 for name, array in weights.items()}
    return TrainState(np.int32(3), weights, {"mu": moments}, weights, np.arange(2, dtype=np.uint32))


def make_checkpoints(root: Path) -> None:
    with Checkpoints(root, keep=2, best="miou") as checkpoints:
        checkpoints.save(3, make_state(), 12, {"task": "points"}, {"miou": 12.5})


def read_checkpoints(root: Path) -> Any:
    state = make_state()
    alone = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    with Checkpoints(root, keep=2, best="miou") as checkpoints:
        found = checkpoints.restore(3, state, jax.tree.map(lambda _: alone, state))
    return jax.tree.map(np.asarray, found.state), found.batches, found.config


def make_run(root: Path) -> None:
    record = {"optimizer": {"accumulate": 1}, "run": {"steps": STEPS}}
    train(make_task(), run_of(root, steps=STEPS, checkpoint_every=STEPS), OPTIMIZER, record)


def resumed(root: Path) -> Any:
    """The model of a run that is done; nothing is trained."""
    from flax import nnx

    record = {"optimizer": {"accumulate": 1}, "run": {"steps": STEPS}}
    model = train(make_task(), run_of(root, steps=STEPS, checkpoint_every=STEPS), OPTIMIZER, record, resume=True)
    rows = (root / "metrics.jsonl").read_text()
    return {str(path): np.asarray(each.get_value()) for path, each in nnx.to_flat_state(nnx.state(model))}, rows


def make_logs(root: Path) -> None:
    with Logs(root, name="points", steps=9, start=0) as logs:
        for step in (1, 2, 3, 4):
            logs.row(step, {"loss": 1 / step})
            logs.picture(step, np.full((4, 4, 3), 40 * step, np.uint8))
    for file in root.glob("events.*"):
        file.unlink()


def read_logs(root: Path) -> Any:
    """What is left of a run that goes on after step 2, once it has made another picture."""
    with Logs(root, name="points", steps=9, start=2) as logs:
        logs.picture(3, np.full((4, 4, 3), 9, np.uint8))
    return (root / "metrics.jsonl").read_text(), read_image(root / "pictures.png")


def make_progress(root: Path) -> None:
    draw = np.random.default_rng(0)
    counts = lambda *shape: draw.integers(0, 99, shape)
    progress = Progress(root, IDENTITY)
    progress.begin(IMAGES_PER_SHARD)
    for number in range(SHARDS):
        counted = ConfusionCounts(counts(1, 1, 3, 3), counts(1, 1, 3, 3), counts(1, 1, 3, 3), counts(1, 1, 2))
        each, all_classes = (1, 1, 1), (1, 1, 1, 3, 3)
        sizes = all_classes, each, all_classes, each, all_classes, (*each, 2)
        matched = SegmentCounts(*(counts(*size) for size in sizes))
        presence, precision = draw.random((1, 1, 3, 3, 2)), draw.random((1, 1, 2))
        further = FurtherCounts(counts(1, 1, 3, 3), counts(1, 1, 2, 3), presence, precision)
        indices = np.arange(2) + IMAGES_PER_SHARD * number
        left_out = (LeftOut(IMAGES_PER_SHARD * number + 2, "skipped", "broken.png: cannot be read"),)
        outcome = Counts(counted, further, matched, indices, counts(2, 3), counts(2), counts(1), np.ones(2), left_out)
        progress.save(number, outcome)


def read_progress(root: Path) -> Any:
    """Damaged counts are counted anew: that is their refusal."""
    progress = Progress(root, IDENTITY)
    size = progress.resumed()
    there = {path.name for path in (root / "progress").glob("*.npz")}
    numbers, outcome = progress.done(size or 1, IMAGES_PER_SHARD * SHARDS)
    lost = there - {f"{number:06d}.npz" for number in numbers}
    if lost or size is None:
        raise Recounted(f"{', '.join(lost)} of {root}, {RUN}")
    return size, numbers, outcome


class Recounted(Exception):
    """A part of an evaluation is measured again."""


def make_cache(root: Path) -> None:
    draw = np.random.default_rng(0)
    batches = [{"latents": draw.normal(size=(2, 3, 4)).astype(np.float16), "ids": draw.integers(0, 9, (2, 5))}] * 2
    root.rmdir()
    write_cache(root, batches, 4, IDENTITY)


def read_cache(root: Path) -> Any:
    cache = RecordCache(root, IDENTITY)
    return [cache[index] for index in range(len(cache))]


def make_pictured(root: Path) -> None:
    for name in ("00_a_cat.png", "01_a_dog.png", "kept.png"):
        (root / name).write_bytes(b"pixels")
    (root / "00_a_cat_masks").mkdir()
    pictures = [
        {"file": "00_a_cat.png", "prompt": "a cat", "masks": "00_a_cat_masks"},
        {"file": "01_a_dog.png", "prompt": "a dog"},
    ]
    (root / RECORD).write_text(json.dumps({"seed": 0, "pictures": pictures}))


def left_of_pictured(root: Path) -> Any:
    remove_former(root)
    assert (root / "kept.png").read_bytes() == b"pixels"
    return sorted(path.name for path in root.iterdir() if path.is_file())


def named_pictures(root: Path) -> Any:
    return read_pictures(root)[1]


def make_perturbed(root: Path) -> None:
    for folder in ("00_a_cat", "kept"):
        (root / folder).mkdir()
        for name in ("base.png", "block_00.png"):
            (root / folder / name).write_bytes(b"pixels")
    (root / perturbation.RECORD).write_text(json.dumps({"samples": [{"prompt": "a cat", "folder": "00_a_cat"}]}))


def left_of_perturbed(root: Path) -> Any:
    """The pictures that stay where the next run is told to overwrite this one."""
    perturbation.remove_former(root)
    return sorted(path.relative_to(root).as_posix() for path in root.glob("*/*"))


A_STEP = Step("masks", "masks", lambda *_: {}, lambda *_: Part("", ""), ("heads.png",))


def make_step(root: Path) -> None:
    (root / "progress").mkdir()
    (root / "heads.png").write_bytes(b"pixels")
    run.keep(A_STEP, root, {"images": 3, "rows": [{"block": 2, "miou": 41.25}], "word": "cat"})


def kept_step(root: Path) -> Any:
    """What an interrupted reproduction goes on with; what it measures again is refused."""
    if (found := run.kept_values(A_STEP, root)) is None:
        raise ValueError(f"{root / 'progress' / 'masks.json'} is damaged: measured again")
    return found


def make_results(root: Path) -> None:
    scores = {"miou": 50.5, "pixel_accuracy": 75.25, "iou": {"cat": 40.5, "sky": None}}
    place = {"protocol": "open_vocabulary", "prompts": "present", "block": 9, "head": None, "step": 8}
    images = {"dataset": "made-up", "split": "val", "images": 3, "pixels": 4096}
    rows = [{**images, **place, "seed": seed, **scores} for seed in (0, 1)]
    (root / "results.json").write_text(json.dumps({"rows": rows, "units": "percent"}))


def compared_results(root: Path) -> Any:
    rows = compare.read_rows(root)
    compare.refuse_others(rows, rows, "one", "other")
    classes = [compare.classes_compared(each, each) for each in rows.values()]
    return rows, [(key.title, compare.compared(each, each, "miou", "mIoU")) for key, each in rows.items()], classes


EVALUATION = """\
model: miniature
data:
  name: folder
  root: /data/set
  resize: square
  scenes: 12
blocks: 0..3
steps: 8
seeds: [0, 1]
background:
  competitors: [sky, wall]
unsupervised:
  threshold: 0.05
  minmax: pixel
batch_size: 2
pictures: 3
skip_unreadable: true
"""
TRAINING = """\
task: magnet
model: miniature
block: 2
data:
  root: /data/set
  size: 64
optimizer:
  learning_rate: 0.001
  warmup: 2
run:
  out: runs/small
  steps: 10
  batch_size: 2
lora:
  rank: 4
  alpha: 4.0
"""


SYNONYMS = """\
sofa: [sofa, couch, settee]
potted plant: [houseplant]
cat: feline
"""


PRIOR = ClassPrior({"sky": 0.021875, "cat": 0.00390625}, block=9, step=8, pictures=500)


def make_prior(root: Path) -> None:
    write_class_prior(root / "prior.json", PRIOR, "miniature")


def read_of_prior(root: Path) -> Any:
    return read_class_prior(root / "prior.json")


def make_synonyms(root: Path) -> None:
    (root / "synonyms.yaml").write_text(SYNONYMS)


def read_of_synonyms(root: Path) -> Any:
    return read_synonyms(str(root / "synonyms.yaml"))


def configured(text: str) -> Any:
    return lambda root: (root / "options.yaml").write_text(text)


def evaluated(root: Path) -> Any:
    return evaluation.parse(["--config", str(root / "options.yaml")])


def trained(root: Path) -> Any:
    return parse(["--config", str(root / "options.yaml")])


CHOSEN = {r"": "another sound value of an option; what is no option is refused"}
GONE = "what is not there is as if it had never been"

READERS: dict[str, Reader] = {
    "checkpoint": Reader(
        make_checkpoints,
        read_checkpoints,
        ("seg4diff_jax/training/checkpoints.py", "convert/run_checkpoint.py"),
        {
            "**/state/**/*": "summed",
            "**/state/**/d/*": "summed",
            "**/state/d/*": "summed",
            "**/3/*/metadata": "summed",
            "**/metrics/metrics": "json",
            "**/_CHECKPOINT_METADATA": "json",
        },
        {r"_CHECKPOINT_METADATA: ": "Orbax's own notes of versions and times", r"metrics: ": "scores are not restored"},
        cases=20,
    ),
    "resumed run": Reader(
        make_run,
        resumed,
        ("seg4diff_jax/training/loop.py",),
        {
            "**/config/metadata": "summed",
            "**/data/metadata": "summed",
            "metrics.jsonl": "text",
            "**/state/**/*": "summed",
        },
        {r"metrics.jsonl: (absent|empty|dangling): ": GONE},
        cases=6,
    ),
    "logs": Reader(
        make_logs,
        read_logs,
        ("seg4diff_jax/training/logs.py",),
        {"metrics.jsonl": "text", "pictures/*.png": "png"},
        {r"metrics.jsonl: (absent|empty|dangling): ": GONE, r"pictures/": "the sheet may leave out what is damaged"},
        cases=8,
    ),
    "counts": Reader(
        make_progress,
        read_progress,
        (
            "seg4diff_jax/evaluation/resumption.py",
            "seg4diff_jax/evaluation/counts.py",
            "seg4diff_jax/interrupted_runs.py",
        ),
        {"progress/*.npz": "zip", "progress/run.json": "json"},
        {r"npz: (absent|swap|directory|dangling): ": GONE},
        errors=(*OWN_ERRORS, ValueError, Recounted),
        cases=24,
    ),
    "record cache": Reader(
        make_cache,
        read_cache,
        ("seg4diff_jax/data/record_cache.py",),
        {"items.json": "json", "items.arrayrecord": "summed"},
        errors=(*OWN_ERRORS, ValueError),
        cases=24,
    ),
    "class prior": Reader(
        make_prior,
        read_of_prior,
        ("seg4diff_jax/class_priors.py",),
        {"prior.json": "json"},
        {r"": "another sound value of a mean; what is no prior is refused"},
        cases=16,
    ),
    "results": Reader(
        make_results,
        compared_results,
        ("seg4diff_jax/command_line/compare.py",),
        {"results.json": "json"},
        {r"": "another number is another score: results are for people and tools, and have no checksums"},
        errors=(*OWN_ERRORS, ValueError),
        cases=16,
    ),
    "record of pictures": Reader(
        make_pictured,
        left_of_pictured,
        ("seg4diff_jax/command_line/picture_directory.py",),
        {RECORD: "json"},
        {"": "files of a damaged record stay where they are"},
        cases=6,
    ),
    "named pictures": Reader(
        make_pictured,
        named_pictures,
        ("seg4diff_jax/command_line/picture_directory.py",),
        {RECORD: "json"},
        {"": "another prompt is another score: a record is for people and tools, and has no checksum"},
        errors=(*OWN_ERRORS, ValueError),
        cases=12,
    ),
    "step of a reproduction": Reader(
        make_step,
        kept_step,
        ("seg4diff_jax/reproduction/run.py",),
        {"progress/masks.json": "json"},
        errors=(ValueError,),
        cases=12,
    ),
    "record of perturbed pictures": Reader(
        make_perturbed,
        left_of_perturbed,
        ("seg4diff_jax/command_line/perturbation.py",),
        {perturbation.RECORD: "json"},
        {"": "files of a damaged record stay where they are"},
        cases=6,
    ),
    "evaluation options": Reader(
        configured(EVALUATION),
        evaluated,
        ("seg4diff_jax/evaluation/options.py",),
        {"*": "yaml"},
        CHOSEN,
        errors=(*OWN_ERRORS, ValueError),
        options=True,
        cases=16,
    ),
    "synonyms": Reader(
        make_synonyms,
        read_of_synonyms,
        ("seg4diff_jax/evaluation/wording.py",),
        {"synonyms.yaml": "yaml"},
        {"": "another word is another name: classes that the set does not have are refused later"},
        cases=12,
    ),
    "training options": Reader(
        configured(TRAINING),
        trained,
        ("seg4diff_jax/command_line/train.py", "seg4diff_jax/configuration.py"),
        {"*": "yaml"},
        CHOSEN,
        errors=(*OWN_ERRORS, ValueError),
        options=True,
        cases=16,
    ),
}
