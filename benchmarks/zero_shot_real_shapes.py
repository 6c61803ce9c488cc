"""Measures images per second at SD3-medium's real shapes: ours, as in `evaluate.py`, and the released algorithm.

    python benchmarks/zero_shot_real_shapes.py                                                    # 512 px, fp32
    python benchmarks/zero_shot_real_shapes.py --size 1024 --dtype bfloat16 --batch 1,2,4,8 --repeats 10     # a GPU
    python benchmarks/zero_shot_real_shapes.py --shapes tiny --size 64                            # does it all run?

Both have the same random weights, images, noise and text states; no text encoder is run. The release, in PyTorch on
diffusers, runs one image at a time through all 24 blocks and keeps block 9's whole attention matrix. Ours runs batches,
stops at that block's queries and keys, and computes only its maps. Each side runs in a process of its own, one at a
time, after a pass that is not counted. During the run 8 GB of weights (4 GB in bfloat16) lie under --scratch. Stages
are timed separately, so they need not add up to a pass. On a CPU, stages and the matmul peak to which they are compared
are in processor seconds, which other programs on the machine change less than wall time; images/s are by wall time.
"""

from __future__ import annotations

import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any, Literal

import jax
import numpy as np
from convert_checkpoint import CONFIGS
from jsonargparse import auto_cli
from real_shapes.flops import stages
from real_shapes.job import SEED, Job, random_inputs
from rich.console import Console
from rich.table import Table

from seg4diff_jax.bilinear import bilinear_matrix
from seg4diff_jax.flow import image_noise

HERE = Path(__file__).parent
TINY_TRANSFORMER = {
    "num_attention_heads": 4,
    "attention_head_dim": 16,
    "caption_projection_dim": 64,
    "joint_attention_dim": 96,
    "pooled_projection_dim": 56,
    "pos_embed_max_size": 24,
    "sample_size": 16,
}
SHAPES: dict[str, dict[str, dict[str, Any]]] = {
    "sd3-medium": {"transformer": CONFIGS["transformer"], "vae": CONFIGS["vae"]},
    "tiny": {
        "transformer": CONFIGS["transformer"] | TINY_TRANSFORMER,
        "vae": CONFIGS["vae"] | {"block_out_channels": [8, 16, 32, 32], "norm_num_groups": 4, "layers_per_block": 1},
    },
}
ROWS = {
    "autoencoder": "VAE encoder, noise",
    "blocks before": "blocks 0..{before}",
    "expert block": "embedding, block {block}",
    "blocks after": "blocks {after}..{last}, head",
    "masks": "scores, labels",
}


@dataclass(frozen=True)
class Side:
    """What one process measured."""

    figures: dict[str, Any]
    arrays: dict[str, np.ndarray]
    batch: int = 1

    @property
    def seconds(self) -> float:
        """Of one image, on the wall's clock."""
        return statistics.median(self.figures["seconds"]) / self.batch

    @property
    def processor_seconds(self) -> float:
        """Of one image: what it kept the host's cores busy."""
        return statistics.median(self.figures["processor_seconds"]) / self.batch

    @property
    def deciding_seconds(self) -> float:
        """Of one image, by the clock that the matmul peak has."""
        return self.processor_seconds if self.figures["device"] == "cpu" else self.seconds


def main(
    size: int = 512,
    dtype: Literal["float32", "bfloat16"] = "float32",
    batch: str = "1",
    repeats: int = 3,
    layers: int = 24,
    block: int = 9,
    shapes: Literal["sd3-medium", "tiny"] = "sd3-medium",
    scratch: str | None = None,
    json_file: str | None = None,
) -> None:
    """Measure.

    Args:
      size: side of the square images in pixels.
      dtype: of parameters and computation, on both sides.
      batch: images at once, ours only; several numbers, as in 1,2,4, are measured one after the other.
      repeats: timed passes.
      layers: number of blocks.
      block: whose attention is read.
      shapes: those of SD3-medium, or a small model's.
      scratch: where weights are written meanwhile. Default: the system's temporary directory.
      json_file: where all figures go.
    """
    jax.config.update("jax_platforms", "cpu")  # the device is the sides'
    configs, batches = SHAPES[shapes], [int(number) for number in batch.split(",")]
    job = Job(configs["transformer"] | {"num_layers": layers}, configs["vae"], size, dtype, block, repeats)
    with tempfile.TemporaryDirectory(prefix="real-shapes-", dir=scratch) as work:
        directory = Path(work)
        job.write(directory)
        inputs = random_inputs(job, max(batches))
        noise = np.asarray(image_noise(SEED, range(max(batches)), job.latent_shape))
        np.savez(directory / "inputs.npz", **inputs, noise=noise)  # pyright: ignore[reportArgumentType]
        release = measured(directory, "release")
        ours = [measured(directory, f"ours_{number}", str(number)) for number in batches]
    figures = report(job, release, ours, Console(width=118, highlight=False))
    if json_file:
        Path(json_file).write_text(json.dumps(figures, indent=2))


def measured(directory: Path, name: str, *arguments: str) -> Side:
    """What a side's own process has measured. Raises CalledProcessError when it fails; it has then said why."""
    path = [str(HERE.parent), str(HERE), *filter(None, [os.environ.get("PYTHONPATH")])]
    command = [sys.executable, "-m", f"real_shapes.{name.split('_')[0]}", str(directory), *arguments]
    subprocess.run(command, check=True, env=os.environ | {"PYTHONPATH": os.pathsep.join(path)})
    with np.load(directory / f"{name}.npz") as arrays:
        figures = json.loads((directory / f"{name}.json").read_text())
        return Side(figures, dict(arrays), *map(int, arguments))


def report(job: Job, release: Side, ours: list[Side], console: Console) -> dict[str, Any]:
    """Print the tables; returns what they say."""
    flops = stages(job.transformer, job.vae, job.size, job.block)
    needed, run = (sum(flops[kind].values()) for kind in ("needed", "release"))
    table = Table(
        title=f"an image of {job.size} px: {job.transformer['num_layers']} blocks, {job.dtype}, random weights"
    )
    shown = ("", "images/s", "ratio", "s", "cores' s", "ratio", "% of peak", "peak GiB", "first s", "load")
    for column in shown:
        table.add_column(column, justify="right" if column else "left", no_wrap=True)
    rows: dict[str, dict[str, float]] = {}
    for name, side, work in [("release", release, run), *((f"ours, batch {s.batch}", s, needed) for s in ours)]:
        rows[name] = {
            "images_per_second": 1 / side.seconds,
            "speedup": release.seconds / side.seconds,
            "processor_speedup": release.processor_seconds / side.processor_seconds,
            "share_of_peak": work / side.deciding_seconds / side.figures["matmul_flops"],
            "peak_gib": side.figures["peak_bytes"] / 2**30,
        }
        first = f"{side.figures['first_pass']:.1f}" if "first_pass" in side.figures else "–"
        load = "–".join(f"{each:.1f}" for each in side.figures["load"])
        one = rows[name]
        table.add_row(
            name,
            f"{one['images_per_second']:.4f}",
            f"{one['speedup']:.2f} x",
            f"{side.seconds:.2f}",
            f"{side.processor_seconds:.2f}",
            f"{one['processor_speedup']:.2f} x",
            f"{100 * one['share_of_peak']:.0f}",
            f"{one['peak_gib']:.1f}",
            first,
            load,
        )
    console.print(table, by_stage(job, flops, release, ours[0]))
    console.print(
        f"TFLOP an image: needed {needed / 1e12:.3f}, the release {run / 1e12:.3f}: {run / needed:.2f} x by arithmetic"
    )
    agreement = compared(release, ours[-1])
    console.print(
        f"equal labels on {100 * agreement['equal_labels']:.4f} % of pixels of {agreement['images']} images; scores "
        f"differ by at most {agreement['scores_differ']:.1e} of the largest; where labels differ, the two best classes "
        f"are at most {agreement['ties_within']:.1e} of the largest apart"
    )
    made = f"{platform.machine()}, {os.cpu_count()} cores; {ours[0].figures['device']}; {datetime.now():%Y-%m-%d %H:%M}"
    console.print(f"{ours[0].figures['versions']}; {release.figures['versions']}; {made}")
    sides = {"release": release.figures, **{f"ours, batch {side.batch}": side.figures for side in ours}}
    return {"rows": rows, "agreement": agreement, "flops": flops, "sides": sides}


def by_stage(job: Job, flops: dict[str, dict[str, int]], release: Side, ours: Side) -> Table:
    """Where the time of one image goes."""
    columns = ("stage", "needed TFLOP", "ours s", "% of peak", "release TFLOP", "release s", "% of peak")
    rates = [f"{side.figures['matmul_flops'] / 1e9:.0f}" for side in (ours, release)]
    unit = "GFLOP a processor second" if ours.figures["device"] == "cpu" else "GFLOP/s"
    table = Table(title=f"by stage; matmul peak: ours {rates[0]} {unit}, PyTorch {rates[1]}")
    for column in columns:
        table.add_column(column, justify="left" if column == "stage" else "right")
    last = job.transformer["num_layers"] - 1
    places = {"block": job.block, "before": job.block - 1, "after": job.block + 1, "last": last}
    for stage, label in ROWS.items():
        cells: list[str] = []
        for side, kind in ((ours, "needed"), (release, "release")):
            work, seconds = flops[kind][stage], side.figures["stages"][stage] / side.batch
            share = f"{100 * work / seconds / side.figures['matmul_flops']:.0f}" if work and seconds > 0 else "–"
            cells += [f"{work / 1e12:.3f}", f"{seconds:.3f}", share]
        table.add_row(label.format(**places), *cells)
    return table


def compared(release: Side, ours: Side) -> dict[str, float]:
    """Labels and scores of the images that both have seen."""
    places = [number for number in release.figures["images"] if number < ours.batch]
    count = len(places)
    theirs = {name: array[:count] for name, array in release.arrays.items()}
    mine = {name: array[:count] for name, array in ours.arrays.items()}
    worst = np.abs(mine["scores"] - theirs["scores"]).max() / theirs["scores"].max()
    equal = float(np.mean(mine["labels"] == theirs["labels"]))
    ties = max(map(widest_tie, mine["labels"], theirs["labels"], theirs["scores"]))
    return {"images": count, "equal_labels": equal, "scores_differ": float(worst), "ties_within": ties}


def widest_tie(mine: np.ndarray, theirs: np.ndarray, scores: np.ndarray) -> float:
    """How far apart the two best classes are where one image's labels differ, at most, over the largest score."""
    rows, columns = np.nonzero(mine != theirs)
    down, across = (
        np.asarray(bilinear_matrix(*sides, sides[1])) for sides in zip(scores.shape[1:], mine.shape, strict=True)
    )
    there = np.einsum("pr,krc,pc->kp", down[rows], scores, across[columns], dtype=np.float64)
    second, best = np.partition(there, (-2, -1), axis=0)[-2:]
    return float((best - second).max(initial=0) / np.abs(scores).max())


if __name__ == "__main__":
    auto_cli(main)
