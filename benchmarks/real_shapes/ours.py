"""Our side of `zero_shot_real_shapes.py`: the programs that `evaluate.py` runs, in a process of their own.

python -m real_shapes.ours DIRECTORY BATCH
"""

from __future__ import annotations

import sys
import time
from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from real_shapes.job import (
    CLASS_TOKENS,
    CLIP_TOKENS,
    SEED,
    SHIFT,
    STEP,
    Clock,
    Job,
    forget_peak_memory,
    hand_back,
    load_average,
    peak_resident,
)

from seg4diff_jax.convert.load import load_component
from seg4diff_jax.evaluation.readouts import Readout, attention_maps
from seg4diff_jax.evaluation.zero_shot import add_scores
from seg4diff_jax.flow import FlowSchedule, image_noise
from seg4diff_jax.models.conditioning import TextConditioning
from seg4diff_jax.models.encoders import segments
from seg4diff_jax.passes import NoisedImages, encode_images
from seg4diff_jax.segmentation.open_vocabulary import label_map


def main(directory: Path, batch: int) -> None:
    job, load_before = Job.read(directory), load_average()
    dtype, checkpoint = jnp.dtype(job.dtype), directory / "checkpoint"
    transformer = load_component(checkpoint, "transformer", dtype=dtype, depth=job.block + 1)
    vae = load_component(checkpoint, "vae", dtype=dtype)
    given = np.load(directory / "inputs.npz")
    pixels, context, pooled = (jnp.asarray(given[name][:batch]) for name in ("pixels", "context", "pooled"))
    parts, rows = segments(CLIP_TOKENS, CLIP_TOKENS), jnp.arange(batch)
    texts = TextConditioning.from_full(context, pooled, CLIP_TOKENS, parts)
    sigma, grid = jnp.float32(FlowSchedule(SHIFT).sigma_at(STEP)), job.latent_shape[0] // transformer.config.patch_size
    averaging = jnp.asarray(np.stack([class_weights()] * batch))
    to_labels = jax.jit(partial(jax.vmap(partial(label_map, size=(job.size, job.size)))))

    def noisy():
        return encode_images(vae, pixels), image_noise(SEED, range(batch), job.latent_shape)

    def maps(latents, noise, block):
        images = NoisedImages(latents, noise, sigma, rows)
        return attention_maps(transformer, images, texts, readouts=(Readout(block),))

    def masks(maps):
        scores = add_scores(jnp.zeros((1, batch, len(CLASS_TOKENS), grid**2)), maps, averaging, rows)[0]
        scores = scores.reshape(*scores.shape[:2], grid, grid)
        return to_labels(scores), scores

    whole = lambda: masks(maps(*noisy(), job.block))
    forget_peak_memory()
    clock, start = Clock(jax.block_until_ready, jax.default_backend() == "cpu"), time.perf_counter()
    labels, scores = jax.block_until_ready(whole())
    first = time.perf_counter() - start
    seconds = clock.each(whole, job.repeats)
    peak = (jax.local_devices()[0].memory_stats() or {}).get("peak_bytes_in_use") or peak_resident()

    latents, noise = noisy()
    at_first = clock.median(lambda: maps(latents, noise, 0), job.repeats)
    at_expert = clock.median(lambda: maps(latents, noise, job.block), job.repeats)
    recorded = maps(latents, noise, job.block)
    figures = {
        "seconds": [taken.wall for taken in seconds],
        "processor_seconds": [taken.processor for taken in seconds],
        "stages": {
            "autoencoder": clock.median(noisy, job.repeats),
            "blocks before": at_expert - at_first,
            "expert block": at_first,
            "blocks after": 0.0,
            "masks": clock.median(lambda: masks(recorded), job.repeats),
        },
        "first_pass": first,
        "peak_bytes": peak,
        "matmul_flops": matmul_rate(clock, dtype),
        "load": [load_before, load_average()],
        "versions": f"jax {jax.__version__}",
        "device": jax.devices()[0].device_kind,
    }
    hand_back(directory, f"ours_{batch}", figures, labels=np.asarray(labels), scores=np.asarray(scores))


def class_weights() -> np.ndarray:
    """fp32 [classes, CLIP tokens]: means over the tokens of each class."""
    weights, first = np.zeros((len(CLASS_TOKENS), CLIP_TOKENS), np.float32), 1
    for row, count in zip(weights, CLASS_TOKENS, strict=True):
        row[first : first + count] = 1 / count
        first += count
    return weights


def matmul_rate(clock: Clock, dtype: jnp.dtype) -> float:
    """Operations a second of a large product of matrices, the best of some."""
    side = 2048 if jax.default_backend() == "cpu" else 8192
    left, right = (jax.random.normal(jax.random.key(number), (side, side), dtype) for number in range(2))
    multiply = jax.jit(jnp.matmul)
    return 2 * side**3 / clock.least(lambda: multiply(left, right), 5)


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]))
