"""PyTorch's side of `verify`: diffusers' and transformers' own modules and forward passes, on the CPU.

Large models are streamed: the module is built without numbers, and hooks give each block its tensors before it runs and
take them away afterwards. Single files go through diffusers' own conversion, so that our name tables are not used here.
"""

from __future__ import annotations

import gc
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any, NamedTuple

import diffusers as _diffusers
import numpy as np
import torch
import transformers
from diffusers.loaders import single_file_utils
from jaxtyping import Float, Int, Shaped
from safetensors import safe_open
from torch import nn

from seg4diff_jax.convert.components import COMPONENTS
from seg4diff_jax.convert.errors import CheckpointError
from seg4diff_jax.convert.progress import OnStage
from seg4diff_jax.convert.readers import Source, TorchComponent
from seg4diff_jax.convert.sources.safetensors_stream import TensorInfo
from seg4diff_jax.convert.sources.stored_tensor import StoredTensor
from seg4diff_jax.convert.verify.inputs import CLIPS, EXPERT_ROW, SCORES_ROW, STEPS, T5, Conditioning, Inputs, Sample

diffusers: Any = _diffusers  # type checkers do not see what it exports lazily
Record = Callable[[str, np.ndarray], None]
Tensors = Mapping[str, Callable[[], torch.Tensor]]
"""Functions that read a tensor, by diffusers' and transformers' names."""

VERSIONS = f"PyTorch {torch.__version__.split('+')[0]}, diffusers {diffusers.__version__}"


class CLIPStates(NamedTuple):
    penultimate: Float[np.ndarray, "batch tokens width"]
    pooled: Float[np.ndarray, "batch projection"]


# ---- tensors --------------------------------------------------------------------------------------------------------


def tensors_of(component: TorchComponent) -> Tensors:
    if component.naming == "gguf":
        return {name: partial(_read, component.tensors[own]) for name, own in _names_of_llama(component).items()}
    if component.naming == "diffusers":
        return {name: partial(_read, info) for name, info in component.tensors.items()}
    return {name: lambda tensor=tensor: tensor for name, tensor in _converted(component).items()}


def _read(stored: StoredTensor) -> torch.Tensor:
    tensor = torch.from_numpy(stored.read().reshape(-1).view(np.uint8))
    return tensor.view(getattr(torch, str(stored.dtype))).reshape(stored.shape)


def _tensors(component: TorchComponent, prefix: str) -> dict[str, torch.Tensor]:
    """Returns a component's tensors under their own names after `prefix`; memory-mapped if plain and in one file."""
    plain = [tensor for tensor in component.tensors.values() if isinstance(tensor, TensorInfo)]
    if len(plain) < len(component.tensors) or len(files := {info.file for info in plain}) > 1:
        return {prefix + key: _read(tensor) for key, tensor in component.tensors.items()}
    with safe_open(files.pop(), "pt") as opened:
        return {prefix + key: opened.get_tensor(component.prefix + key) for key in component.tensors}


def _names_of_llama(component: TorchComponent) -> dict[str, str]:
    """Returns llama.cpp's name of each tensor of T5's encoder by transformers' name, from the `gguf` package."""
    from gguf.constants import MODEL_ARCH
    from gguf.tensor_mapping import get_tensor_name_map

    known = get_tensor_name_map(MODEL_ARCH.T5ENCODER, component.config["num_layers"])
    config = transformers.T5Config.from_dict(dict(component.config))
    names = _without_numbers(lambda: transformers.T5EncoderModel(config)).state_dict()
    found = {name: f"{known.get_name(name.removesuffix('.weight'))}.weight" for name in names}
    return {name: own for name, own in found.items() if own in component.tensors}


def _converted(component: TorchComponent) -> dict[str, torch.Tensor]:
    """Returns a single file's tensors under diffusers' names, by diffusers' own functions, which need the prefix."""
    name, prefix = component.name, COMPONENTS[component.name].prefix
    tensors = _tensors(component, prefix)
    if name == "transformer":
        return single_file_utils.convert_sd3_transformer_checkpoint_to_diffusers(tensors)
    if name == "vae":
        return single_file_utils.convert_ldm_vae_checkpoint(tensors, component.config)
    if name == T5:
        state = single_file_utils.convert_sd3_t5_checkpoint_to_diffusers(tensors)
    else:
        state = single_file_utils.convert_ldm_clip_checkpoint(tensors, prefix)
    state.pop("logit_scale", None)
    if name == "text_encoder":  # as diffusers does: a single file's CLIP-L is not projected
        state["text_projection.weight"] = torch.eye(component.config["hidden_size"])
    return state


def _load(module: nn.Module, tensors: Tensors, dtype: torch.dtype, prefix: str = "", but: tuple[str, ...] = ()) -> None:
    """Gives a module without numbers the tensors under `prefix`, except those under a prefix of `but`."""
    state = {
        name.removeprefix(prefix): read().to(dtype)
        for name, read in tensors.items()
        if name.startswith(prefix) and not name.startswith(but)
    }
    found = module.load_state_dict(state, strict=False, assign=True)
    wrong = [name for name in [*found.missing_keys, *found.unexpected_keys] if not name.startswith(but)]
    if wrong:
        raise CheckpointError(f"PyTorch's {type(module).__name__} and the checkpoint differ in {', '.join(wrong)}")


def _stream(layers: Mapping[str, nn.Module], tensors: Tensors, dtype: torch.dtype) -> None:
    """Gives each layer, by prefix, its numbers only while it runs. Hooks registered later see the layer's output."""

    def enter(layer: nn.Module, _: Any, prefix: str) -> None:
        _load(layer, tensors, dtype, prefix)

    def leave(layer: nn.Module, *_: Any) -> None:
        layer.to("meta")

    for prefix, layer in layers.items():
        layer.register_forward_pre_hook(partial(enter, prefix=prefix))
        layer.register_forward_hook(leave)


def _without_numbers(make: Callable[[], nn.Module]) -> Any:
    diffusers.utils.logging.set_verbosity_error()
    transformers.logging.set_verbosity_error()
    with torch.device("meta"):
        return make().eval()


def _numpy(tensor: torch.Tensor) -> Shaped[np.ndarray, "*shape"]:
    return _widened(tensor).contiguous().numpy()


def _widened(tensor: torch.Tensor) -> torch.Tensor:
    """Returns the tensor in fp32 or in its own dtype, whichever is wider."""
    return tensor.to(torch.promote_types(tensor.dtype, torch.float32))


def _dtype(name: str) -> torch.dtype:
    return getattr(torch, name)


# ---- models ---------------------------------------------------------------------------------------------------------


@torch.no_grad()
def vae(
    component: TorchComponent, dtype: str, pixels: Float[np.ndarray, "batch height width channels"], record: Record
) -> Float[np.ndarray, "batch rows columns latent"]:
    """Encodes pixels to mean latents, and decodes them. Returns the latents as the transformer takes them."""
    module = _without_numbers(lambda: diffusers.AutoencoderKL.from_config(component.config))
    _load(module, tensors_of(component), _dtype(dtype))
    scale, shift = module.config.scaling_factor, module.config.shift_factor or 0.0
    images = torch.from_numpy(pixels).permute(0, 3, 1, 2).to(_dtype(dtype))
    latents = (module.encode(images).latent_dist.mode() - shift) * scale
    decoded = module.decode(latents / scale + shift).sample
    latents = _numpy(latents.permute(0, 2, 3, 1))
    record("vae: latents of the picture", latents)
    record("vae: decoded pixels", _numpy(decoded.permute(0, 2, 3, 1)))
    return latents


@torch.no_grad()
def clip(component: TorchComponent, dtype: str, ids: Int[np.ndarray, "batch tokens"], record: Record) -> CLIPStates:
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    state = {name: read() for name, read in tensors_of(component).items()}
    module: Any = transformers.CLIPTextModelWithProjection.from_pretrained(
        None,
        config=transformers.CLIPTextConfig.from_dict(dict(component.config)),
        state_dict=state,
        dtype=_dtype(dtype),
    )
    output = module.eval()(torch.from_numpy(ids).long(), output_hidden_states=True)
    states = CLIPStates(_numpy(output.hidden_states[-2]), _numpy(output.text_embeds))
    record(f"{component.name}: penultimate states", states.penultimate)
    record(f"{component.name}: pooled", states.pooled)
    return states


@torch.no_grad()
def t5(
    component: TorchComponent, dtype: str, ids: Int[np.ndarray, "batch tokens"], record: Record
) -> Float[np.ndarray, "batch tokens width"]:
    """Runs T5's encoder layer by layer, and returns its states."""
    config = transformers.T5Config.from_dict(dict(component.config))
    module = _without_numbers(lambda: transformers.T5EncoderModel(config))
    layers = {f"encoder.block.{i}.": block for i, block in enumerate(module.encoder.block)}
    tensors = dict(tensors_of(component))
    names = "shared.weight", "encoder.embed_tokens.weight"
    embedding = next(tensors[name] for name in names if name in tensors)().to(_dtype(dtype))
    tensors |= dict.fromkeys(names, lambda: embedding)
    _load(module, tensors, _dtype(dtype), but=tuple(layers))
    _stream(layers, tensors, _dtype(dtype))
    states = _numpy(module(input_ids=torch.from_numpy(ids).long()).last_hidden_state)
    record(f"{component.name}: states", states)
    return states


def prompt(
    clips: Sequence[CLIPStates],
    t5_states: Float[np.ndarray, "1 tokens width"] | None,
    joint_dim: int,
    record: Record,
) -> Conditioning:
    """Returns context and pooled as diffusers' SD3 pipeline joins them.

    Zeros, as many as CLIP tokens, stand for an absent T5.
    """
    clip_states = torch.cat([torch.from_numpy(states.penultimate) for states in clips], dim=-1)
    clip_states = nn.functional.pad(clip_states, (0, joint_dim - clip_states.shape[-1]))
    last = torch.zeros_like(clip_states) if t5_states is None else torch.from_numpy(t5_states)
    context = torch.cat([clip_states, last], dim=-2).numpy()
    pooled = torch.cat([torch.from_numpy(states.pooled) for states in clips], dim=-1).numpy()
    record("prompt: joint context", context)
    record("prompt: pooled", pooled)
    return Conditioning(context, pooled)


def noisy(
    shift: float,
    latents: Float[np.ndarray, "batch rows columns channels"],
    noise: Float[np.ndarray, "batch rows columns channels"],
    step: int,
    record: Record,
) -> tuple[Float[np.ndarray, "batch rows columns channels"], float]:
    """Returns the latents at the noise level of the masks, and the timestep of that level."""
    module = diffusers.FlowMatchEulerDiscreteScheduler(shift=shift)
    module.set_timesteps(STEPS)
    record("scheduler: timesteps", _numpy(module.timesteps))
    timestep = module.timesteps[-step]
    noised = _numpy(module.scale_noise(torch.from_numpy(latents), timestep[None], torch.from_numpy(noise)))
    record("scheduler: noisy latents", noised)
    return noised, float(timestep)


class ExactTimeFeatures(nn.Module):
    """diffusers' `Timesteps` of SD3 in fp64.

    diffusers' own is fp32 in a module of any dtype, which is wrong by 1e-5 and would not be exact.
    """

    def __init__(self, features: int):
        super().__init__()
        self.frequencies = features // 2

    def forward(self, timesteps: torch.Tensor) -> torch.Tensor:
        exponents = torch.arange(self.frequencies, dtype=torch.float64) / self.frequencies
        angles = timesteps.double()[:, None] * 10000.0**-exponents
        return torch.cat([angles.cos(), angles.sin()], dim=-1)


class MapRecorder:
    """An attention processor: runs diffusers' own, and records the image-to-text map by formula, in fp32 at least."""

    def __init__(self, processor: Any, tokens: int, record: Record):
        self.processor, self.tokens, self.record = processor, tokens, record

    def __call__(self, attn: Any, hidden_states, encoder_hidden_states=None, attention_mask=None):
        split = lambda x: x.unflatten(-1, (attn.heads, -1)).transpose(1, 2)
        q, k, text_k = attn.to_q(hidden_states), attn.to_k(hidden_states), attn.add_k_proj(encoder_hidden_states)
        q, k, text_k = split(q), split(k), split(text_k)
        if attn.norm_q is not None:
            q, k, text_k = attn.norm_q(q), attn.norm_k(k), attn.norm_added_k(text_k)
        q, k = _widened(q), _widened(torch.cat([k, text_k], dim=2)).transpose(-1, -2)
        text = slice(hidden_states.shape[1], hidden_states.shape[1] + self.tokens)
        scores, probs = [], []
        for head in range(attn.heads):  # all heads at once would take gigabytes at 1024 pixels
            rows = q[:, head] @ k[:, head] * q.shape[-1] ** -0.5
            scores.append(rows[..., text].clone())
            probs.append(rows.softmax(-1)[..., text].clone())
        self.record("image-to-text scores", _numpy(torch.stack(scores, 1)))
        self.record("image-to-text probs", _numpy(torch.stack(probs, 1)))
        return self.processor(attn, hidden_states, encoder_hidden_states, attention_mask)


@torch.no_grad()
def transformer(
    component: TorchComponent,
    dtype: str,
    sample: Sample,
    block: int,
    tokens: int,
    record: Record,
    on_progress: OnStage,
) -> Float[np.ndarray, "1 image tokens"]:
    """Runs diffusers' whole forward pass, one block in memory at a time.

    Returns the image-to-text probabilities of block number `block`, averaged over heads. `tokens` is the length of
    CLIP's prompt.
    """
    module = _without_numbers(lambda: diffusers.SD3Transformer2DModel.from_config(component.config))
    layers = {f"transformer_blocks.{i}.": block for i, block in enumerate(module.transformer_blocks)}
    tensors = tensors_of(component)
    _load(module, tensors, _dtype(dtype), but=tuple(layers))
    _stream(layers, tensors, _dtype(dtype))
    if dtype == "float64":
        module.time_text_embed.time_proj = ExactTimeFeatures(module.time_text_embed.time_proj.num_channels)

    def on_output(submodule: nn.Module, see: Callable[[Any], None]) -> None:
        submodule.register_forward_hook(lambda _, __, output: see(output))

    embedded = {
        "embedded latents": module.pos_embed,
        "embedded context": module.context_embedder,
        "conditioning": module.time_text_embed,
    }
    for what, submodule in embedded.items():
        on_output(submodule, lambda output, what=what: record(f"transformer: {what}", _numpy(output)))
    kept: list[np.ndarray] = []

    def record_block(what: str, array: np.ndarray, number: int) -> None:
        record(f"block {number}: {what}", array)
        if number == block and what == "image-to-text probs":
            kept.append(array.mean(axis=1))
            record(EXPERT_ROW, kept[0])

    for number, layer in enumerate(module.transformer_blocks):
        record_own = partial(record_block, number=number)
        layer.attn.set_processor(MapRecorder(layer.attn.processor, tokens, record_own))
        on_output(layer, partial(_record_streams, record_own, on_progress, f"block {number + 1} of {len(layers)}"))
    velocity = module(
        hidden_states=torch.from_numpy(sample.latents).permute(0, 3, 1, 2).to(_dtype(dtype)),
        encoder_hidden_states=torch.from_numpy(sample.conditioning.context).to(_dtype(dtype)),
        pooled_projections=torch.from_numpy(sample.conditioning.pooled).to(_dtype(dtype)),
        timestep=torch.tensor([sample.timestep]),
    ).sample
    record("velocity", _numpy(velocity.permute(0, 2, 3, 1)))
    return kept[0]


def _record_streams(record: Record, on_progress: OnStage, done: str, output: Any) -> None:
    text, image = output
    record("image stream", _numpy(image))
    if text is not None:  # the last block updates no text
        record("text stream", _numpy(text))
    on_progress(f"transformer, {done}")


def masks(
    probs: Float[np.ndarray, "1 image tokens"],
    averaging: Float[np.ndarray, "1 classes tokens"],
    size: int,
    record: Record,
) -> None:
    """Records class scores and labels: mean over each class's tokens, bilinear to the picture's size, arg-max."""
    maps = torch.from_numpy(probs).transpose(-1, -2)
    scores = torch.from_numpy(averaging).to(maps) @ maps
    side = round(scores.shape[-1] ** 0.5)
    grid = scores.unflatten(-1, (side, side))
    upsampled = nn.functional.interpolate(grid, size=(size, size), mode="bilinear", align_corners=False)
    record(SCORES_ROW, _numpy(upsampled[0]))
    record("masks", upsampled.argmax(1)[0].to(torch.int32).numpy())


# ---- all of it ------------------------------------------------------------------------------------------------------


class Shared(NamedTuple):
    """PyTorch's results that JAX is given: the VAE's latents (None without a VAE), and the transformer's inputs."""

    latents: Float[np.ndarray, "1 rows columns channels"] | None
    sample: Sample | None


def run(source: Source, inputs: Inputs, dtype: str, record: Record, on_progress: OnStage) -> Shared:
    """Runs every component in turn, each on the results of the one before. Only arrays are kept."""

    def part(function: Callable[..., Any], name: str, *arguments: Any) -> Any:
        on_progress(name)
        result = function(source.component(name), dtype, *arguments)
        gc.collect()  # modules hold reference cycles
        return result

    present, ids = source.configs, inputs.prompt.ids
    latents = part(vae, "vae", inputs.picture, record) if "vae" in present else None
    clips = [part(clip, name, ids[name], record) for name in CLIPS if name in present]
    t5_states = part(t5, T5, ids[T5], record) if T5 in present else None
    conditioning = prompt(clips, t5_states, inputs.joint_dim, record) if len(clips) == len(CLIPS) else None
    if inputs.transformer is None:
        return Shared(latents, None)
    given = inputs.transformer
    clean = given.latents if latents is None else latents
    sample = Sample(
        *noisy(source.schedule.shift, clean, given.noise, given.step, record), conditioning or given.conditioning
    )
    probs = part(transformer, "transformer", sample, given.block, inputs.prompt.tokens, record, on_progress)
    masks(probs, inputs.prompt.averaging, inputs.size, record)
    return Shared(latents, sample)
