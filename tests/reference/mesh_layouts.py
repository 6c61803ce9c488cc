"""Losses of a small flow-matching run under several mesh layouts of 8 simulated devices, as one JSON line each."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from seg4diff_jax.models.clip import CLIPText, CLIPTextConfig
from seg4diff_jax.models.mmdit import MMDiT
from seg4diff_jax.models.mmdit_config import MMDiTConfig
from seg4diff_jax.text import TokenIds
from seg4diff_jax.training.flow_matching import TRAINABLE, Denoiser, Objective, loss
from seg4diff_jax.training.loop import MeshConfig, RunConfig, Task, train
from seg4diff_jax.training.optimizers import OptimizerConfig
from seg4diff_jax.training.state import fresh

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


class Latents:
    def __len__(self) -> int:
        return 32

    def __getitem__(self, index: int, /) -> dict:
        rng = np.random.default_rng(index)
        ids = rng.integers(0, 64, TOKENS).astype(np.int32)
        return {"latents": rng.normal(size=(4, 4, 4)).astype(np.float32), "clip_l": ids, "clip_g": ids[::-1].copy()}


def make_denoiser(rngs: nnx.Rngs) -> Denoiser:
    return Denoiser(MMDiT(TRANSFORMER, rngs=rngs), CLIPText(CLIP, rngs=rngs), CLIPText(CLIP, rngs=rngs))


def losses(out: Path, mesh: MeshConfig) -> list[float]:
    empty = jnp.zeros((1, TOKENS), jnp.int32)
    task = Task(
        name="layout",
        init=fresh(make_denoiser),
        loss=lambda model, batch, key: loss(
            model, batch, key, objective=Objective(caption_dropout=0.3), empty=TokenIds(empty, empty)
        ),
        source=Latents(),
        trainable=TRAINABLE,
    )
    run = RunConfig(str(out), steps=4, batch_size=8, log_every=1, checkpoint_every=100, mesh=mesh)
    train(task, run, OptimizerConfig(learning_rate=3e-3, schedule="constant", average=0.9))
    return [json.loads(line)["loss"] for line in (out / "metrics.jsonl").read_text().splitlines()]


if __name__ == "__main__":
    directory = Path(sys.argv[1])
    jax.config.update("jax_compilation_cache_dir", None)
    for layout in sys.argv[2:]:
        sizes = [int(size) for size in layout.split("x")]
        print(json.dumps({"layout": layout, "losses": losses(directory / layout, MeshConfig(*sizes))}), flush=True)
