"""The released algorithm's side of `zero_shot_real_shapes.py`: PyTorch and diffusers, in a process of their own.

    python -m real_shapes.release DIRECTORY

First it writes the random weights, which our side reads too. Then images go one at a time through all blocks. The
expert block's whole attention matrix is computed and kept, instead of its fused attention (the release computes both).
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import torch
from diffusers import AutoencoderKL, FlowMatchEulerDiscreteScheduler, SD3Transformer2DModel
from real_shapes.job import (
    CLASS_TOKENS,
    SHIFT,
    STEP,
    Clock,
    Job,
    Taken,
    forget_peak_memory,
    hand_back,
    load_average,
    peak_resident,
)

from seg4diff_jax.convert.families import SD3
from tests.reference.random_weights import SD3_QUERIES, randomize_, temper_
from tests.reference.release import Masks, Release

CUDA = torch.cuda.is_available()


def wait(_: Any) -> None:
    if CUDA:
        torch.cuda.synchronize()


CLOCK = Clock(wait, processor=not CUDA)
NAMES = [" ".join([f"class{number}"] * count) for number, count in enumerate(CLASS_TOKENS)]


class WithoutText(Release):
    """The release given its prompts' states; every name has as many tokens as words."""

    def __init__(self, transformer: SD3Transformer2DModel, vae: AutoencoderKL, inputs: Any):
        self.transformer, self.vae, self.inputs = transformer, vae, inputs
        self.scheduler = FlowMatchEulerDiscreteScheduler(num_train_timesteps=1000, shift=SHIFT)
        self.image = 0
        self.encode_prompt = lambda *_, **__: (self._given("context"), None, self._given("pooled"), None)

    def _given(self, name: str) -> torch.Tensor:
        array = torch.from_numpy(self.inputs[name][self.image : self.image + 1])
        return array.to(self.vae.device, self.vae.dtype)

    def _prompts(self, names: list[str]) -> list[list[str]]:
        return [names]

    def _token_count(self, name: str) -> int:
        return len(name.split())

    def masks(self, image: int, block: int, size: int) -> Masks:
        self.image = image
        pixels = self._given("pixels").permute(0, 3, 1, 2)
        noise = self.inputs["noise"][image]
        return self.segment(pixels, NAMES, noise, block=block, label_size=(size, size), step=STEP)


def main(directory: Path) -> None:
    job, load_before = Job.read(directory), load_average()
    dtype = getattr(torch, job.dtype)
    transformer, vae = SD3Transformer2DModel(**job.transformer), AutoencoderKL(**job.vae)
    for number, (name, module) in enumerate({"transformer": transformer, "vae": vae}.items()):
        randomize_(module, number)
        if module is transformer:
            temper_(module, SD3_QUERIES, 5)
        module.to(dtype).save_pretrained(directory / "checkpoint" / name, max_shard_size="50GB")
        module.to("cuda" if CUDA else "cpu")
    index = {name: SD3.model_index[name] for name in ("_class_name", "transformer", "vae")}
    (directory / "checkpoint" / "model_index.json").write_text(json.dumps(index))
    release = WithoutText(transformer, vae, dict(np.load(directory / "inputs.npz")))
    images = len(release.inputs["pixels"])

    forget_peak_memory()
    found = {0: release.masks(0, job.block, job.size)}
    seconds = []
    for number in range(job.repeats):
        start = CLOCK.now()
        found[number % images] = release.masks(number % images, job.block, job.size)
        end = CLOCK.now()
        seconds.append(Taken(end.wall - start.wall, end.processor - start.processor))
    peak = torch.cuda.max_memory_allocated() if CUDA else peak_resident()
    stages = [stage_seconds(release, job) for _ in range(job.repeats)]
    figures = {
        "seconds": [taken.wall for taken in seconds],
        "processor_seconds": [taken.processor for taken in seconds],
        "stages": {name: float(np.median([each[name] for each in stages])) for name in stages[0]},
        "peak_bytes": peak,
        "matmul_flops": matmul_rate(dtype),
        "load": [load_before, load_average()],
        "versions": f"torch {torch.__version__}, {torch.get_num_threads()} threads",
        "device": torch.cuda.get_device_name() if CUDA else "cpu",
        "images": sorted(found),
    }
    ordered = [found[number] for number in sorted(found)]
    arrays = {name: np.stack([getattr(each, name) for each in ordered]) for name in ("labels", "scores")}
    hand_back(directory, "release", figures, **arrays)


def stage_seconds(release: WithoutText, job: Job) -> dict[str, float]:
    """One image, waited for at the end of each stage."""
    marks: dict[str, float] = {}

    def mark(name: str) -> None:
        wait(None)
        marks[name] = CLOCK.deciding(CLOCK.now())

    blocks = release.transformer.transformer_blocks
    hooks = [
        release.transformer.register_forward_pre_hook(lambda *_: mark("latents")),
        blocks[0].register_forward_pre_hook(lambda *_: mark("embedded")),
        blocks[job.block].register_forward_pre_hook(lambda *_: mark("before")),
        blocks[job.block].register_forward_hook(lambda *_: mark("expert")),
        release.transformer.register_forward_hook(lambda *_: mark("velocity")),
    ]
    mark("start")
    release.masks(0, job.block, job.size)
    mark("end")
    for hook in hooks:
        hook.remove()
    between = lambda first, last: marks[last] - marks[first]
    return {
        "autoencoder": between("start", "latents"),
        "blocks before": between("embedded", "before"),
        "expert block": between("latents", "embedded") + between("before", "expert"),
        "blocks after": between("expert", "velocity"),
        "masks": between("velocity", "end"),
    }


def matmul_rate(dtype: torch.dtype) -> float:
    """Operations a second of a large product of matrices, the best of some."""
    side, device = (8192, "cuda") if CUDA else (2048, "cpu")
    left, right = (torch.randn(side, side, device=device, dtype=dtype) for _ in range(2))
    return 2 * side**3 / CLOCK.least(lambda: left @ right, 5)


if __name__ == "__main__":
    with torch.no_grad():
        main(Path(sys.argv[1]))
