"""The MM-DiT at its published sizes equals diffusers; one framework in memory at a time."""

from __future__ import annotations

import functools
import gc

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from diffusers import SD3Transformer2DModel

from seg4diff_jax.convert.assemble import abstract
from seg4diff_jax.convert.tables import mmdit as table
from seg4diff_jax.models.conditioning import TextConditioning
from seg4diff_jax.models.encoders import segments
from seg4diff_jax.models.sd3.model import MMDiT, MMDiTConfig
from tests.reference.attention import explicit_softmax
from tests.reference.random_weights import SD3_QUERIES, randomize_, relative_error, temper_
from tests.reference.saved import load_saved

pytestmark = pytest.mark.slow

SD3_MEDIUM = {
    "attention_head_dim": 64,
    "caption_projection_dim": 1536,
    "in_channels": 16,
    "joint_attention_dim": 4096,
    "num_attention_heads": 24,
    "num_layers": 24,
    "out_channels": 16,
    "patch_size": 2,
    "pooled_projection_dim": 2048,
    "pos_embed_max_size": 192,
    "sample_size": 128,
}
SD35_MEDIUM = SD3_MEDIUM | {
    "dual_attention_layers": list(range(13)),
    "pos_embed_max_size": 384,
    "qk_norm": "rms_norm",
}
SD35_LARGE = SD3_MEDIUM | {
    "caption_projection_dim": 2432,
    "num_attention_heads": 38,
    "num_layers": 38,
    "qk_norm": "rms_norm",
}
CASES = {
    "SD3-medium, whole": SD3_MEDIUM,
    "SD3.5-medium, a dual block and the last": SD35_MEDIUM | {"num_layers": 2, "dual_attention_layers": [0]},
    "SD3.5-large, a block and the last": SD35_LARGE | {"num_layers": 2},
}
SIDE, TEXT = 32, 154
"""Latents of 256 px, and SD3's joint sequence: 77 CLIP tokens, 77 in T5's place."""


@pytest.mark.parametrize("case", CASES)
def test_velocity_and_every_image_to_text_map_equal_diffusers(case, tmp_path):
    rng = np.random.default_rng(0)
    draw = lambda *shape: rng.standard_normal(shape).astype(np.float32)
    latents, context, pooled = draw(1, SIDE, SIDE, 16), draw(1, TEXT, 4096), draw(1, 2048)
    theirs = randomize_(SD3Transformer2DModel(**CASES[case]))
    temper_(theirs, SD3_QUERIES, 5)
    processors = explicit_softmax(theirs)
    with torch.no_grad():
        velocity = theirs(
            hidden_states=torch.from_numpy(latents).permute(0, 3, 1, 2),
            encoder_hidden_states=torch.from_numpy(context),
            pooled_projections=torch.from_numpy(pooled),
            timestep=torch.tensor([515.072]),
        ).sample.permute(0, 2, 3, 1)
    tokens = (SIDE // 2) ** 2
    maps = [processor.probs[:, :, :tokens, tokens : tokens + 77].clone() for processor in processors]
    config = MMDiTConfig.from_json(dict(theirs.config))
    theirs.save_pretrained(tmp_path, max_shard_size="50GB")
    del theirs, processors
    gc.collect()

    ours = load_saved(abstract(lambda rngs: MMDiT(config, rngs=rngs)), table.diffusers(config), tmp_path)
    run = jax.jit(functools.partial(MMDiT.__call__, capture=range(config.num_layers)))
    conditioning = TextConditioning(jnp.asarray(context), jnp.asarray(pooled), segments=segments(77, TEXT - 77))
    found, records = run(ours, jnp.asarray(latents), jnp.asarray([515.072]), conditioning)
    assert relative_error(found, velocity) <= 1e-4
    assert len(records) == config.num_layers
    assert max(relative_error(records[i].probs, expected) for i, expected in enumerate(maps)) <= 1e-4
