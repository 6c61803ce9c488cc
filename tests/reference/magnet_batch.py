"""A small batch for MAGNET's loss, and the model that it trains."""

from __future__ import annotations

from typing import Any

import jax.numpy as jnp
import numpy as np
from flax import nnx

from seg4diff_jax.magnet.objective import MagnetBatch, MagnetObjective
from seg4diff_jax.magnet.targets import averaging_of_ids
from seg4diff_jax.models.conditioning import TextConditioning
from seg4diff_jax.models.encoders import segments
from seg4diff_jax.models.lora import LoRA
from seg4diff_jax.models.sd3.model import MMDiT
from seg4diff_jax.passes import NoisedImages
from tests.reference.magnet import random_masks
from tests.reference.mmdit import SMALL

BLOCK, CLIP, TAIL, GRID = 1, 7, 4, (8, 8)
REAL = np.array([[True, False, True], [True, True, True]])
SPANS = [[[1, 2], [], [3]], [[1], [2, 3], [4, 5]]]
PROMPT = np.array([[90, 5, 6, 5, 91, 91, 91], [90, 1, 1, 2, 3, 2, 91]])
NAMES = np.array([[[5, 6], [-1, -1], [5, -1]], [[1, -1], [1, 2], [3, 2]]])


class Trained(nnx.Module):
    def __init__(self, transformer: MMDiT, head: Any = None):
        self.transformer, self.head = transformer, head


TRAINABLE = nnx.Any(LoRA, nnx.PathContains("head"))


def make_batch(objective: MagnetObjective) -> MagnetBatch:
    rng = np.random.default_rng(7)
    drawn = lambda *shape: rng.standard_normal(shape).astype(np.float32)
    draw = lambda *shape: jnp.asarray(drawn(*shape))
    context = drawn(2, CLIP + TAIL, SMALL["joint_attention_dim"])
    context[:, CLIP:] = 0
    averaging = None
    if objective.focal == "release":
        averaging, found = averaging_of_ids(jnp.asarray(PROMPT), jnp.asarray(NAMES))
        np.testing.assert_array_equal(found, REAL)
    elif objective.targets == "classes":
        averaging = jnp.asarray([[[(t in span) / max(1, len(span)) for t in range(CLIP)] for span in x] for x in SPANS])
    return MagnetBatch(
        images=NoisedImages(draw(2, 16, 16, 16), draw(2, 16, 16, 16), jnp.array([0.35, 0.8])),
        texts=TextConditioning.from_full(
            jnp.asarray(context), draw(2, SMALL["pooled_projection_dim"]), TAIL, segments(CLIP, TAIL)
        ),
        masks=jnp.asarray(random_masks((2, 3, 20, 24), seed=1)),
        real=jnp.asarray(REAL),
        averaging=None if objective.targets == "matching" else averaging,
    )
