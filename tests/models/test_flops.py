"""Operations counted from configurations equal those of PyTorch's counter, and of our own traced programs."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import pytest
import torch
from flax import nnx
from torch.utils.flop_counter import FlopCounterMode

from seg4diff_jax.models.attention import ForwardOptions
from seg4diff_jax.models.clip import CLIPText, CLIPTextConfig
from seg4diff_jax.models.flops import (
    adapter_step_flops,
    block_flops,
    clip_text_flops,
    mmdit_flops,
    t5_flops,
    vae_encoder_flops,
)
from seg4diff_jax.models.lora import IMAGE_ATTENTION, LoRA, LoRAConfig, add_lora
from seg4diff_jax.models.sd3.model import MMDiTConfig
from seg4diff_jax.models.t5 import T5Config, T5Encoder
from seg4diff_jax.models.vae import VAE, VAEConfig
from seg4diff_jax.planning.arithmetic import operations
from tests.reference.attention import ExplicitSoftmax, explicit_softmax
from tests.reference.mmdit import VARIANTS, make_inputs, make_pair, run_torch

IMAGE, TEXT = 64, 9  # tokens of `make_inputs`
SD3 = {"num_layers": 24, "num_attention_heads": 24, "caption_projection_dim": 1536, "pos_embed_max_size": 192}
SD35_MEDIUM = SD3 | {"pos_embed_max_size": 384, "qk_norm": True, "dual_attention_layers": tuple(range(13))}
SD35_LARGE = {"num_layers": 38, "num_attention_heads": 38, "caption_projection_dim": 2432, "qk_norm": True}
SD3_VAE = VAEConfig(
    latent_channels=16, block_out_channels=(128, 256, 512, 512), layers_per_block=2, use_quant_conv=False
)


def traced_flops(function, *args) -> float:
    return operations(jax.make_jaxpr(function)(*args).jaxpr)


@pytest.mark.parametrize(
    ("config", "block", "whole"), [(SD3, 0.352, 8.437), (SD35_MEDIUM, 0.532, 10.783), (SD35_LARGE, 0.779, 29.597)]
)
def test_published_sizes_at_1024_pixels(config, block, whole):
    parsed = MMDiTConfig(**config)
    assert block_flops(parsed, 3, 4096, 154) / 1e12 == pytest.approx(block, abs=5e-4)
    assert mmdit_flops(parsed, 4096, 154) / 1e12 == pytest.approx(whole, abs=5e-4)


def test_published_encoders_at_1024_pixels():
    clip_l = CLIPTextConfig(hidden_size=768, intermediate_size=3072, num_attention_heads=12, projection_dim=768)
    clip_g = CLIPTextConfig(
        hidden_size=1280,
        intermediate_size=5120,
        num_hidden_layers=32,
        num_attention_heads=20,
        projection_dim=1280,
    )
    t5 = T5Config(d_model=4096, d_ff=10240, num_layers=24, num_heads=64)
    assert vae_encoder_flops(SD3_VAE, 1024, 1024) / 1e12 == pytest.approx(4.883, abs=5e-4)
    assert (clip_text_flops(clip_l, 77) + clip_text_flops(clip_g, 77)) / 1e12 == pytest.approx(0.11, abs=5e-3)
    assert [t5_flops(t5, tokens) / 1e12 for tokens in (77, 256)] == pytest.approx([0.72, 2.40], abs=5e-3)


@pytest.mark.parametrize("variant", VARIANTS)
def test_a_forward_pass_is_what_pytorchs_counter_counts(variant):
    config = VARIANTS[variant]
    theirs, ours = make_pair(config)
    explicit_softmax(theirs)  # of fused attention the counter knows nothing on CPUs
    for number in config.get("dual_attention_layers", ()):
        theirs.transformer_blocks[number].attn2.set_processor(ExplicitSoftmax())
    inputs = make_inputs(config, batch=1)
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        run_torch(theirs, inputs)
    assert mmdit_flops(ours.config, IMAGE, TEXT) == counter.get_total_flops()


@pytest.mark.parametrize("variant", ["sd3", "sd3.5-medium"])
@pytest.mark.parametrize("remat", ["nothing", "blocks", "all_but_matmuls"])
def test_a_step_of_adapters_is_what_its_traced_gradient_holds(variant, remat):
    config = VARIANTS[variant]
    mmdit = make_pair(config)[1]
    lora = LoRAConfig(rank=3, targets=(*IMAGE_ATTENTION, "text.attention.out", "image.mlp.down"))
    graph, adapters, base = nnx.split(add_lora(mmdit, lora, nnx.Rngs(0)), LoRA, ...)
    inputs = make_inputs(config, batch=1)
    only_attention = jax.checkpoint_policies.dots_with_no_batch_dims_saveable
    policies = {"nothing": False, "blocks": True, "all_but_matmuls": only_attention}

    options = ForwardOptions(remat=policies[remat])

    def loss(adapters):
        return jnp.square(nnx.merge(graph, adapters, base)(**inputs, options=options)[0]).mean()

    counted = adapter_step_flops(mmdit.config, lora, IMAGE, TEXT, remat=remat)
    assert counted.forward == traced_flops(loss, adapters)
    assert counted.done == traced_flops(jax.grad(loss), adapters)


def test_encoders_are_what_their_traced_programs_hold():
    vae = VAEConfig(latent_channels=4, block_out_channels=(8, 16, 16), layers_per_block=2, norm_num_groups=4)
    pixels = jnp.zeros((1, 32, 24, 3))
    assert vae_encoder_flops(vae, 32, 24) == traced_flops(VAE(vae, rngs=nnx.Rngs(0)).encode, pixels)
    ids = jnp.zeros((1, 7), jnp.int32)
    clip = CLIPTextConfig(64, 16, 40, 3, 2, 9, projection_dim=8)
    assert clip_text_flops(clip, 7) == traced_flops(CLIPText(clip, rngs=nnx.Rngs(0)), ids)
    t5 = T5Config(vocab_size=32, d_model=16, d_kv=6, d_ff=24, num_layers=2, num_heads=2)
    assert t5_flops(t5, 7) == traced_flops(T5Encoder(t5, rngs=nnx.Rngs(0)), ids)
