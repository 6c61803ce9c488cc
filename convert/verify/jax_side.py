"""JAX's side of `verify`: this package's models. The transformer and T5 are streamed, one block in memory at a time."""

from __future__ import annotations

import gc
import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from functools import cache, partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Float, Int, Shaped

from seg4diff_jax.bilinear import upsampler
from seg4diff_jax.convert.assemble import abstract, assemble
from seg4diff_jax.convert.components import abstract_model
from seg4diff_jax.convert.layout import contiguous
from seg4diff_jax.convert.load import load_component
from seg4diff_jax.convert.progress import OnStage
from seg4diff_jax.convert.readers import ComponentReader, Source
from seg4diff_jax.convert.verify.inputs import (
    CLIPS,
    EXPERT_ROW,
    SCORES_ROW,
    STEPS,
    T5,
    Conditioning,
    Inputs,
    Sample,
    TransformerInputs,
)
from seg4diff_jax.flow import add_noise
from seg4diff_jax.models.attention import AttentionRequest, ForwardOptions, JointAttention, attention_record
from seg4diff_jax.models.clip import CLIPText, CLIPTextOutput
from seg4diff_jax.models.conditioning import TextConditioning
from seg4diff_jax.models.encoders import join_states
from seg4diff_jax.models.kernels import repeat_last
from seg4diff_jax.models.sd3.block import JointBlock, StreamState
from seg4diff_jax.models.sd3.model import MMDiT
from seg4diff_jax.models.stacked_layers import LayerStack
from seg4diff_jax.models.t5 import T5Block, T5Encoder
from seg4diff_jax.models.vae import VAE
from seg4diff_jax.passes import encode_images
from seg4diff_jax.segmentation.open_vocabulary import class_scores, label_map

Check = Callable[[str, np.ndarray], None]


class OneLayer(nnx.Module):
    """A model that is one layer, for `assemble` to fill."""

    layer_stacks: tuple[LayerStack, ...] = ()

    def __init__(self, layer: Any):
        self.layer = layer


def _numpy(array: Shaped[Array, "*shape"]) -> Shaped[np.ndarray, "*shape"]:
    return np.asarray(array.astype(jnp.float32))


def _read(
    component: ComponentReader, names: Iterable[str], dtype: str, rename: Callable[[str], str] = lambda name: name
) -> Iterable[tuple[str, np.ndarray]]:
    cast = jnp.dtype(dtype)
    return ((rename(name), contiguous(array, cast)) for name, array in component.parameters(set(names)))


def abstract_layer(make: Callable[[nnx.Rngs], Any]) -> OneLayer:
    """Returns an abstract model of one block, which `make` builds from its random generators."""
    return abstract(lambda rngs: OneLayer(make(rngs)))


def load_layer(component: ComponentReader, names: Iterable[str], dtype: str, prefix: str, like: OneLayer) -> OneLayer:
    """Returns one block of a model, with the parameters under `prefix`; nothing else is read.

    Args:
      names: names of all parameters of the component.
      like: the block without its numbers, as `abstract_layer` returns it.
    """
    own = [name for name in names if name.startswith(prefix)]
    rename = lambda name: "layer." + name.removeprefix(prefix)
    return assemble(like, _read(component, own, dtype, rename))


def _load_rest(component: ComponentReader, names: Iterable[str], dtype: str, model: Any) -> Any:
    """Fills a model whose blocks have been taken out, with all other parameters."""
    return assemble(model, _read(component, (n for n in names if not n.startswith("blocks.")), dtype))


# ---- models ---------------------------------------------------------------------------------------------------------


def vae(
    source: Source,
    dtype: str,
    pixels: Float[np.ndarray, "batch height width channels"],
    latents: Float[np.ndarray, "batch rows columns latent"],
    check: Check,
) -> Float[np.ndarray, "batch rows columns latent"]:
    """Encodes the pixels, and decodes the given latents. Returns the encoded pixels."""
    model = load_component(source, "vae", dtype=dtype)
    assert isinstance(model, VAE)
    compute = jnp.dtype(dtype)
    encoded = _numpy(encode_images(model, jnp.asarray(pixels, compute)))
    check("vae: latents of the picture", encoded)
    check("vae: decoded pixels", _numpy(_decode(model, jnp.asarray(latents, compute))))
    return encoded


@jax.jit
def _decode(model: VAE, latents: Array) -> Array:
    return model.decode(latents)


def clip(source: Source, name: str, dtype: str, ids: Int[np.ndarray, "batch tokens"], check: Check) -> CLIPTextOutput:
    model = load_component(source, name, dtype=dtype)
    assert isinstance(model, CLIPText)
    output = _encode_text(model, jnp.asarray(ids))
    check(f"{name}: penultimate states", _numpy(output.penultimate))
    check(f"{name}: pooled", _numpy(output.pooled))
    return output


@jax.jit
def _encode_text(model: CLIPText, ids: Array) -> CLIPTextOutput:
    return model(ids)


def t5(
    source: Source, dtype: str, ids: Int[np.ndarray, "batch tokens"], check: Check
) -> Float[Array, "batch tokens width"]:
    """Runs T5Encoder's forward pass layer by layer, and returns its states."""
    name = T5
    component = source.component(name)
    component.check()
    names = list(component.layout())
    compute = jnp.dtype(dtype)
    model: Any = abstract_model(name, component.config, compute)
    assert isinstance(model, T5Encoder)
    del model.blocks
    model = _load_rest(component, names, dtype, model)
    layer = abstract_layer(lambda rngs: T5Block(model.config, dtype=compute, param_dtype=compute, rngs=rngs))
    states = jnp.take(model.token_embedding.embedding[...], jnp.asarray(ids), axis=0).astype(jnp.float32)
    bias = model.relative_bias(ids.shape[1])
    for i in range(model.config.num_layers):
        states = _t5_layer(load_layer(component, names, dtype, f"blocks.{i}.", layer), states, bias)
        states.block_until_ready()
        gc.collect()  # modules hold reference cycles
    states = model.final_norm(states).astype(compute)
    check(f"{name}: states", _numpy(states))
    return states


@jax.jit
def _t5_layer(block: OneLayer, states: Array, bias: Array) -> Array:
    return block.layer(states, bias)


def prompt(
    clips: Sequence[CLIPTextOutput],
    t5_states: Float[Array, "1 tokens width"] | None,
    joint_dim: int,
    check: Check,
) -> Conditioning:
    states = join_states(clips[0], clips[1], t5_states, joint_dim=joint_dim)
    joined = Conditioning(_numpy(states.full_context), _numpy(states.pooled))
    check("prompt: joint context", joined.context)
    check("prompt: pooled", joined.pooled)
    return joined


def noisy(
    source: Source,
    samples: Sequence[Float[np.ndarray, "batch rows columns channels"]],
    noise: Float[np.ndarray, "batch rows columns channels"],
    step: int,
    check: Check,
) -> tuple[Float[np.ndarray, "batch rows columns channels"], float]:
    """Returns the last sample's latents at the noise level of the masks, and the timestep. Checks the first sample."""
    schedule = source.schedule
    sigmas, sigma = schedule.sigmas(STEPS), schedule.sigma_at(step, STEPS)
    check("scheduler: timesteps", (schedule.num_train_timesteps * sigmas).astype(np.float32))
    noised = [np.asarray(add_noise(jnp.asarray(latents), jnp.asarray(noise), sigma)) for latents in samples]
    check("scheduler: noisy latents", noised[0])
    return noised[-1], schedule.num_train_timesteps * sigma


def transformer(
    source: Source,
    dtype: str,
    samples: Sequence[Sample],
    given: TransformerInputs,
    tokens: int,
    check: Check,
    on_progress: OnStage,
) -> Float[np.ndarray, "1 image tokens"]:
    """Runs MMDiT's forward pass block by block, on all samples in one batch.

    Only the first sample is checked. Returns the last sample's image-to-text probabilities in the expert block, as the
    pipeline reads them for masks. `tokens` is the length of CLIP's prompt.
    """
    component = source.component("transformer")
    component.check()
    names = list(component.layout())
    compute = jnp.dtype(dtype)
    config = source.parsed["transformer"]
    model: Any = abstract_model("transformer", component.config, compute)
    model.stacks = nnx.List([])
    model = _load_rest(component, names, dtype, model)
    latents = np.concatenate([sample.latents for sample in samples])
    context, pooled = map(np.concatenate, zip(*(sample.conditioning for sample in samples), strict=True))
    timesteps = np.asarray([sample.timestep for sample in samples], np.float32)
    conditioning = TextConditioning.from_full(jnp.asarray(context), jnp.asarray(pooled), given.last_token_count)
    state, vector = _embed(model, latents, timesteps, conditioning)
    text = lambda state: _numpy(repeat_last(state.text[:1], state.last_token_count, axis=1))
    check("transformer: embedded latents", _numpy(state.image[:1]))
    check("transformer: embedded context", text(state))
    check("transformer: conditioning", _numpy(vector[:1]))
    kind = partial(JointBlock, config, dtype=compute, param_dtype=compute)
    abstract_block = cache(lambda dual, last: abstract_layer(lambda rngs: kind(dual=dual, last=last, rngs=rngs)))
    everything = AttentionRequest(text_tokens=(0, tokens))
    for_masks = replace(everything, scores=False, mean_heads=True)
    for i in range(config.num_layers):
        dual, last = i in config.dual_attention_layers, i == config.num_layers - 1
        block = load_layer(component, names, dtype, f"blocks.{i}.", abstract_block(dual, last))
        if i == given.block:
            alone = _record_alone(block, state, vector, ForwardOptions(for_masks)).probs
            check(EXPERT_ROW, _numpy(alone[:1]))
            probs = _numpy(alone[-1:])
        state, record = _joint_block(block, state, vector, ForwardOptions(everything))
        del block
        gc.collect()  # modules hold reference cycles
        assert record.scores is not None
        assert record.probs is not None
        check(f"block {i}: image-to-text scores", _numpy(record.scores[:1]))
        check(f"block {i}: image-to-text probs", _numpy(record.probs[:1]))
        check(f"block {i}: image stream", _numpy(state.image[:1]))
        if not last:
            check(f"block {i}: text stream", text(state))
        on_progress(f"transformer, block {i + 1} of {config.num_layers}")
    check("velocity", _numpy(_velocity(model, state.image[:1], vector[:1], (latents.shape[1], latents.shape[2]))))
    return probs


@jax.jit
def _embed(model: MMDiT, latents: Array, timesteps: Array, conditioning: TextConditioning) -> tuple[StreamState, Array]:
    return model.embed(latents, timesteps, conditioning)


@partial(jax.jit, static_argnames=("options",))
def _joint_block(
    block: OneLayer, state: StreamState, vector: Array, options: ForwardOptions
) -> tuple[StreamState, JointAttention]:
    assert options.request is not None, "blocks are compared by their records"
    state, joint = block.layer(state, vector, options)
    return state, options.request.read(joint)


@partial(jax.jit, static_argnames=("options",))
def _record_alone(block: OneLayer, state: StreamState, vector: Array, options: ForwardOptions) -> JointAttention:
    """Returns the attention record from q, k and the normaliser alone, as `attention_at` does for its last block."""
    image, text = block.layer.qkv(state, vector)
    return attention_record(image, text, options)


@partial(jax.jit, static_argnames=("size",))
def _velocity(model: MMDiT, image: Array, vector: Array, size: tuple[int, int]) -> Array:
    return model.velocity(image, vector, size)


def masks(
    probs: Float[np.ndarray, "1 image tokens"],
    averaging: Float[np.ndarray, "1 classes tokens"],
    size: int,
    check: Check,
) -> None:
    scores = class_scores(jnp.asarray(probs), jnp.asarray(averaging))[0]
    side = math.isqrt(scores.shape[-1])
    grid = scores.reshape(-1, side, side)
    check(SCORES_ROW, np.asarray(upsampler((side, side), (size, size))(grid)))
    check("masks", np.asarray(label_map(grid, (size, size))))


# ---- all of it ------------------------------------------------------------------------------------------------------


def run(source: Source, inputs: Inputs, shared: Any, dtype: str, check: Check, on_progress: OnStage) -> None:
    """Runs every component in turn on PyTorch's results, and all of them together from the picture to the masks.

    `shared` is what PyTorch's run returned.
    """
    present, ids = source.configs, inputs.prompt.ids
    latents = None
    if "vae" in present:
        on_progress("vae")
        latents = vae(source, dtype, inputs.picture, shared.latents, check)
    clips = []
    for name in CLIPS:
        if name in present:
            on_progress(name)
            clips.append(clip(source, name, dtype, ids[name], check))
    t5_states = None
    if T5 in present:
        on_progress(T5)
        t5_states = t5(source, dtype, ids[T5], check)
    conditioning = prompt(clips, t5_states, inputs.joint_dim, check) if len(clips) == len(CLIPS) else None
    if inputs.transformer is None:
        return
    given = inputs.transformer
    clean = [given.latents] if latents is None else [shared.latents, latents]
    own = Sample(*noisy(source, clean, given.noise, given.step, check), conditioning or given.conditioning)
    samples = [shared.sample] if latents is None and conditioning is None else [shared.sample, own]
    probs = transformer(source, dtype, samples, given, inputs.prompt.tokens, check, on_progress)
    masks(probs, inputs.prompt.averaging, inputs.size, check)
