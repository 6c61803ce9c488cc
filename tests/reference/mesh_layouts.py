"""A small flow-matching run, scored and sampled as the miniature's is, under a mesh layout of simulated devices.

python -m tests.reference.mesh_layouts DIR LAYOUT ...
"""

from __future__ import annotations

import json
import sys
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import Mesh

from seg4diff_jax.flow import FlowSchedule
from seg4diff_jax.miniature.flow_matching import TRAINABLE, Objective, loss
from seg4diff_jax.miniature.grounding import MOST_CLASSES, grounding
from seg4diff_jax.models.clip import CLIPText, CLIPTextConfig
from seg4diff_jax.models.encoders import Encoders, TokenIds
from seg4diff_jax.models.sd3.config import MMDiTConfig
from seg4diff_jax.models.sd3.model import MMDiT
from seg4diff_jax.models.vae import VAE, VAEConfig
from seg4diff_jax.parallel import MeshConfig, parameter_shardings
from seg4diff_jax.processes import join_processes
from seg4diff_jax.segmentation.metrics import IGNORED
from seg4diff_jax.training.loop import RunConfig, Task, train
from seg4diff_jax.training.optimizers import OptimizerConfig
from seg4diff_jax.training.sample_pictures import Denoiser, Samples, sample_row
from seg4diff_jax.training.state import fresh, name
from tests.reference.processes import one_of_several

TOKENS = 8
CLIP = CLIPTextConfig(64, 16, 32, 2, 2, TOKENS, projection_dim=8, eos_token_id=2)
TRANSFORMER = MMDiTConfig(
    num_layers=2,
    num_attention_heads=2,
    attention_head_dim=16,
    caption_projection_dim=32,
    patch_size=1,
    in_channels=4,
    out_channels=4,
    sample_size=4,
    pos_embed_max_size=6,
    joint_attention_dim=32,
    pooled_projection_dim=16,
    qk_norm=True,
)
AUTOENCODER = VAEConfig(block_out_channels=(4, 4), norm_num_groups=2)
PRESENT = 3
"""Classes of an item."""


class Latents:
    """Of noise, with captions of noise and labels of noise."""

    def __init__(self, count: int):
        self.count = count

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, index: int, /) -> dict:
        rng = np.random.default_rng(index)
        ids = rng.integers(0, 64, TOKENS).astype(np.int32)
        averaging, rows = np.zeros((MOST_CLASSES, TOKENS), np.float32), np.full(MOST_CLASSES, IGNORED, np.uint8)
        averaging[range(PRESENT), 1 + np.arange(PRESENT)] = 1
        rows[:PRESENT] = range(PRESENT)
        labels = np.kron(rng.integers(0, PRESENT, (4, 4)), np.ones((2, 2))).astype(np.uint8)
        shown = {"labels": labels, "averaging": averaging, "class_of_row": rows}
        latents = rng.normal(size=(4, 4, 4)).astype(np.float32)
        return {"latents": latents, "clip_l": ids, "clip_g": ids[::-1].copy(), **shown}


def make_denoiser(seed: int, mesh: Mesh) -> Denoiser:
    """CLIPs as `fresh` makes them. The transformer's numbers are numpy's: to draw them in a program takes longer to
    compile than a training step."""
    clip = fresh(lambda rngs: CLIPText(CLIP, rngs=rngs))(seed, mesh)
    graph, state = nnx.split(nnx.eval_shape(lambda: MMDiT(TRANSFORMER, rngs=nnx.Rngs(0))))
    rule, rng = parameter_shardings(mesh), np.random.default_rng(seed)
    for path, variable in nnx.to_flat_state(state):
        shape = variable.get_value().shape
        noise = rng.normal(size=shape).astype(np.float32)
        array = 1 + noise / 10 if path[-1] == "scale" else noise / np.sqrt(shape[-2] if path[-1] == "kernel" else 100)
        place = rule(name(path), shape)
        variable.set_value(jax.make_array_from_callback(shape, place, array.astype(np.float32).__getitem__))
    return Denoiser(nnx.merge(graph, state), Encoders(None, clip, nnx.clone(clip)))


def make_task() -> Task:
    empty = TokenIds(*(np.zeros((1, TOKENS), np.int32),) * 2)
    captions = TokenIds(*(np.stack([Latents(2)[index][name] for index in range(2)]) for name in ("clip_l", "clip_g")))
    vae: Any = VAE(AUTOENCODER, rngs=nnx.Rngs(0))
    samples = Samples(count=2, steps=3)
    how = {"captions": captions, "empty": empty, "samples": samples, "schedule": FlowSchedule(3.0)}
    return Task(
        name="layout",
        init=make_denoiser,
        loss=partial(loss, objective=Objective(caption_dropout=0.3), empty=TokenIds(*map(jnp.asarray, empty[:2]))),
        source=Latents(32),
        trainable=TRAINABLE,
        evaluate=partial(grounding, source=Latents(3), sigmas=(0.5,), batch_size=2),
        pictures=partial(sample_row, vae=vae, **how),
        export=export,
    )


def export(model: Denoiser, directory: Path) -> None:
    flat = nnx.to_flat_state(nnx.state(model.transformer))
    directory.mkdir()
    np.savez(directory / "transformer.npz", **{name(path): np.asarray(each.get_value()) for path, each in flat})


def run(out: Path, layout: str) -> list[dict[str, float]]:
    """Rows of the log: four steps, and the evaluation after the last."""
    mesh = MeshConfig(*map(int, layout.split("x")))
    settings = RunConfig(str(out), steps=4, batch_size=8, log_every=1, checkpoint_every=100, mesh=mesh)
    train(make_task(), settings, OptimizerConfig(learning_rate=3e-3, schedule="constant", average=0.9))
    return rows(out)


def rows(out: Path) -> list[dict[str, float]]:
    """What is computed, without the clock's."""
    found = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    return [{name: value for name, value in row.items() if name != "images_per_second"} for row in found]


if __name__ == "__main__":
    jax.config.update("jax_compilation_cache_dir", None)
    if one_of_several():
        join_processes()
    for layout in sys.argv[2:]:
        run(Path(sys.argv[1]) / layout, layout)
