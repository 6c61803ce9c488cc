"""Measures what a whole vocabulary costs: ADE150's classes in three prompts an image, beside the classes present.

    python benchmarks/whole_vocabulary.py                                                    # 512 px, fp32
    python benchmarks/whole_vocabulary.py --size 256 --repeats 5
    python benchmarks/whole_vocabulary.py --shapes tiny --size 64 --images 2 --repeats 1     # does it all run?

What runs is the evaluator (`evaluation.measurement`), on random weights: SD3-medium's blocks up to the expert block,
its autoencoder, and small text encoders, which encode all prompts before anything is timed. A word is a token, so
ADE150 has 166 of them. The images are noise, with nine classes each. The protocols run in turn, so that other programs
on the machine disturb each alike, and processor seconds stand beside those of the clock. Operations are those of the
evaluator's programs as JAX traces them, loops multiplied out (`planning`), without the text encoders.
"""

from __future__ import annotations

import json
import os
import platform
import statistics
import tempfile
import zlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from datetime import datetime
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jsonargparse import auto_cli
from real_shapes.job import Clock, Taken
from rich.console import Console
from rich.table import Table
from zero_shot_real_shapes import SHAPES

from seg4diff_jax.convert.components import abstract_model
from seg4diff_jax.data.sets import SETS
from seg4diff_jax.evaluation.batches import EvaluationBatch, asked_otherwise, assemble
from seg4diff_jax.evaluation.benchmarks import Benchmark
from seg4diff_jax.evaluation.measurement import Measurement, Settings
from seg4diff_jax.evaluation.zero_shot import Tally, add_scores, without_images
from seg4diff_jax.flow import FlowSchedule
from seg4diff_jax.models.encoders import Encoders
from seg4diff_jax.parallel import make_mesh
from seg4diff_jax.pipeline import Pipeline
from seg4diff_jax.planning.arithmetic import operations
from seg4diff_jax.planning.evaluator_plan import needed_flops
from seg4diff_jax.planning.evaluator_programs import (
    EvaluatorConfig,
    EvaluatorModels,
    described,
    each_program,
    settled_config,
)
from seg4diff_jax.segmentation.mask_options import PAPERS_MASKS
from seg4diff_jax.text import Tokenizers

PROTOCOLS = {"classes present": ("present",), "whole vocabulary": ("all",), "both in one run": ("present", "all")}
Kind = Literal["present", "all"]
ASKED: dict[Kind, int] = {"present": 1, "all": 3}
"""Prompts of an image, for each kind of prompts."""
PICTURE = (512, 683)
"""Height and width of images and label maps: usual ones in ADE."""
CLASSES_AN_IMAGE, VOCABULARY, STEP, SEED = 9, 49408, 8, 0
SMALL = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 2}


class Words:
    """A tokenizer with CLIP's special tokens and length, for which every word is one token."""

    model_max_length, bos_token_id, eos_token_id, pad_token_id = 77, VOCABULARY - 2, VOCABULARY - 1, VOCABULARY - 1

    def __call__(self, texts: Sequence[str], *, add_special_tokens: bool = True, verbose: bool = False) -> Any:
        rows = [[zlib.crc32(word.encode()) % (VOCABULARY - 2) for word in text.split()] for text in texts]
        if add_special_tokens:
            rows = [[self.bos_token_id, *row, self.eos_token_id] for row in rows]
        return SimpleNamespace(input_ids=rows)


class Noise:
    """Images of noise whose label maps have stripes of some classes each: those of ADE, in turn."""

    def __init__(self, images: int, classes: int):
        self.images, self.classes = images, classes

    def __len__(self) -> int:
        return self.images

    def __getitem__(self, index: int) -> dict[str, Any]:
        rng = np.random.default_rng(index)
        chosen = rng.choice(self.classes, CLASSES_AN_IMAGE, replace=False).astype(np.uint8)
        stripes = np.arange(PICTURE[1]) * CLASSES_AN_IMAGE // PICTURE[1]
        labels = np.broadcast_to(chosen[stripes], PICTURE).copy()
        return {"image": rng.integers(0, 256, (*PICTURE, 3), np.uint8), "labels": labels, "name": str(index)}


def random_model(name: str, config: dict[str, Any], seed: int, depth: int | None = None) -> Any:
    """One component in fp32, with normal weights of standard deviation 0.02."""
    graph, state = nnx.split(abstract_model(name, config, jnp.float32, depth))
    rng = np.random.default_rng(seed)
    draw = lambda leaf: jnp.asarray(0.02 * rng.standard_normal(leaf.shape, np.float32))
    return nnx.merge(graph, jax.tree.map(draw, state))


def with_small_text_encoders(configs: dict[str, dict[str, Any]]) -> dict[str, dict[str, Any]]:
    """Returns the configurations with those of two CLIPs, whose pooled vectors are as wide as the transformer takes."""
    pooled = configs["transformer"]["pooled_projection_dim"]
    text = SMALL | {"vocab_size": VOCABULARY, "eos_token_id": VOCABULARY - 1, "projection_dim": pooled // 2}
    return configs | {"text_encoder": text, "text_encoder_2": text}


def random_pipeline(configs: dict[str, dict[str, Any]], block: int, size: int) -> Pipeline:
    encoders = [random_model(name, configs[name], 1) for name in ("vae", "text_encoder", "text_encoder_2")]
    return Pipeline(
        transformer=random_model("transformer", configs["transformer"], 0, depth=block + 1),
        encoders=Encoders(*encoders),
        tokenizers=Tokenizers(Words(), Words()),  # pyright: ignore[reportArgumentType]
        schedule=FlowSchedule(),
        expert_block=block,
        trained_size=size,
    )


@dataclass(frozen=True)
class Protocol:
    """What one protocol took for an image: the median run, how often the transformer ran, and for how many prompts."""

    runs: Sequence[Taken]
    images: int
    launches: int
    prompts: float

    def seconds(self, clock: Literal["wall", "processor"]) -> float:
        return statistics.median(getattr(run, clock) for run in self.runs) / self.images


def main(
    size: int = 512,
    images: int = 4,
    batch: int = 4,
    repeats: int = 3,
    block: int = 9,
    shapes: Literal["sd3-medium", "tiny"] = "sd3-medium",
) -> None:
    """Measure.

    Args:
      size: side of the square that the model sees, in pixels.
      images: how many are evaluated in a run.
      batch: images, and prompts, at a time.
      repeats: timed runs of each protocol.
      block: whose attention is read.
      shapes: those of SD3-medium, or a small model's.
    """
    configs, classes = with_small_text_encoders(SHAPES[shapes]), SETS["ade20k150"].classes
    benchmark = Benchmark("ade20k150", classes, Noise(images, len(classes)))
    pipe = random_pipeline(configs, block, size)
    measurements = {
        name: Measurement(pipe, benchmark, Settings((block,), (STEP,), (SEED,), batch, prompts=kinds))
        for name, kinds in PROTOCOLS.items()
    }
    clock = Clock(jax.block_until_ready, jax.default_backend() == "cpu")
    counts = {name: measurement.outcome() for name, measurement in measurements.items()}
    taken: dict[str, list[Taken]] = {name: [] for name in measurements}
    for _ in range(repeats):
        for name, measurement in measurements.items():
            taken[name].append(clock.once(measurement.outcome))
    protocols = {
        name: Protocol(taken[name], images, int(counts[name].forwards[:-1].sum()), prompts(measurement, images))
        for name, measurement in measurements.items()
    }
    console = Console(width=118, highlight=False)
    console.print(by_protocol(protocols, f"{images} images of {size} px in batches of {batch}, block {block}"))
    both = measurements["both in one run"]
    first = [both.reader.example(index) for index in range(min(images, batch))]
    console.print(by_stage(both, assemble(first, batch), clock, repeats))
    sizes = sorted({size, 8 * configs["transformer"]["sample_size"]})
    console.print(by_arithmetic(configs, block, sizes, len(classes)))
    made = f"{platform.machine()}, {os.cpu_count()} cores; {jax.devices()[0].device_kind}; jax {jax.__version__}"
    console.print(f"{made}; load {os.getloadavg()[0]:.1f}; {datetime.now():%Y-%m-%d %H:%M}")


def prompts(measurement: Measurement, images: int) -> float:
    """Returns how many prompts an image has."""
    examples = [measurement.reader.example(index) for index in range(images)]
    found = [len(asked(example)[1].prompts) for asked in measurement.asked.values() for example in examples]
    return sum(found) / images


def by_protocol(protocols: dict[str, Protocol], title: str) -> Table:
    table = Table("protocol", "prompts", "launches", "s", "ratio", "processor s", "ratio", title=title)
    base = next(iter(protocols.values()))
    for name, one in protocols.items():
        cells = [f"{one.prompts:g}", str(one.launches)]
        for clock in ("wall", "processor"):
            cells += [f"{one.seconds(clock):.3f}", f"{one.seconds(clock) / base.seconds(clock):.3f}"]
        table.add_row(name, *cells)
    return table


def by_stage(measurement: Measurement, batch: EvaluationBatch, clock: Clock, repeats: int) -> Table:
    """Where the time of a batch goes: a run of each stage, and how often each protocol runs it."""
    forward, images, table = measurement.forward, len(batch.examples), Table(title="stages")
    for column in ("stage", f"{clock.unit}, an image", "runs: present", "all"):
        table.add_column(column, justify="left" if column == "stage" else "right")
    latents = forward.latents(batch.pixels)
    asked = {name: asked_otherwise(batch, asked) for name, asked in measurement.asked.items()}
    launches = {name: len(each.prompts) for name, each in asked.items()}
    rows = asked["present"].prompts[0]
    texts = forward.encoded(rows.texts)
    maps = partial(forward.maps, latents, batch.indices, texts, rows.image_of_row, step=STEP, seed=SEED)

    def add(stage: str, work: Callable[[], Any], runs: dict[str, int]) -> None:
        cells = [f"{clock.median(work, repeats) / images:.3f}", *(str(runs.get(name, "")) for name in ASKED)]
        table.add_row(stage, *cells)

    add("autoencoder", partial(forward.latents, batch.pixels), dict.fromkeys(ASKED, 1))
    add(f"blocks 0..{measurement.settings.blocks[0]}", maps, launches)
    for name, each in asked.items():
        add(f"scores of {each.class_of_row.shape[1]} rows", partial(scored, each, maps()), {name: launches[name]})
        add("counting of these", partial(counted, measurement, each, forward.grid(latents)), {name: 1})
    return table


def by_arithmetic(configs: dict[str, dict[str, Any]], block: int, sizes: list[int], classes: int) -> Table:
    """Operations of an image, counted in traced programs, and what the models' shapes say that masks need."""
    columns = ("size", "protocol", "autoencoder", "blocks", "scores, counting", "TFLOP", "ratio", "needed", "ratio")
    table = Table(*columns, title="arithmetic")
    for size in sizes:
        rows = [counted_operations(configs, block, size, classes, kind, count) for kind, count in ASKED.items()]
        for name, (done, needed) in zip(PROTOCOLS, rows, strict=False):
            whole, base = sum(done.values()), sum(rows[0][0].values())
            parts = done["autoencoder"], done["blocks"], done["scores"] + done["counting"]
            cells = [f"{each / 1e12:.3f}" for each in (*parts, whole)]
            ratios = f"{whole / base:.3f}", f"{needed / rows[0][1]:.3f}"
            table.add_row(f"{size}", name, *cells, ratios[0], f"{needed / 1e12:.3f}", ratios[1])
    return table


def counted_operations(
    configs: dict[str, dict[str, Any]], block: int, size: int, classes: int, kind: Kind, prompts: int
) -> tuple[dict[str, float], float]:
    """Returns operations of one image by program, and those that its masks need, without text encoders."""
    with tempfile.TemporaryDirectory() as work:
        for name, values in configs.items():
            (Path(work) / name).mkdir()
            (Path(work) / name / "config.json").write_text(json.dumps(values))
        config = EvaluatorConfig(work, "float32", block, size, 1, kind, prompts, classes)
        checkpoint = described(config)
    config, mesh, done = settled_config(config, checkpoint, 1), make_mesh(among=jax.devices()[:1]), {}

    def count(name: str, runs: int, function: Any, *arguments: Any, **static: Any) -> Any:
        if name == "text encoders":
            return jax.eval_shape(partial(function, **static), *arguments)
        traced = function.trace(*arguments, **static)
        done[name] = runs * operations(traced.jaxpr)
        return traced.out_info

    each_program(config, checkpoint, EvaluatorModels.of(config, checkpoint, mesh), mesh, count)
    return done, needed_flops(replace(config, prompts="all"), checkpoint)


def scored(batch: EvaluationBatch, maps: Any) -> Any:
    rows = batch.prompts[0]
    shape = len(maps), len(batch.pixels), batch.class_of_row.shape[1], maps.shape[2]
    return add_scores(jnp.zeros(shape), maps, rows.averaging, rows.image_of_row)


def counted(measurement: Measurement, batch: EvaluationBatch, grid: tuple[int, int]) -> Any:
    """Counts of a pass at the first noise level: its own, and those of the two guessers."""
    shape = 1, len(batch.pixels), batch.class_of_row.shape[1], grid[0] * grid[1]
    scores = jax.random.uniform(jax.random.key(0), shape)
    found = []
    for each in (scores, *without_images(scores, batch.indices, SEED)):
        found.append(Tally(1, len(measurement.benchmark.classes)).count([(each, PAPERS_MASKS)], grid, batch))
    return found


if __name__ == "__main__":
    auto_cli(main)
