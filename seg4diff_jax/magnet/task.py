"""MAGNET: low-rank adapters that make the expert block's attention agree with masks (Seg4Diff, section 4).

    loss = |v(z_sigma, sigma, prompt) - (eps - z)|^2 + 0.1 focal + 0.2 dice,   sigma = shifted sigmoid(N(0, 0.5))

The checkpoint itself is frozen. Its weights are stored once, in the dtype of the computation, without gradients or
optimizer state. The adapters and, if there is one, the mask head are trained in fp32.
"""

from __future__ import annotations

import shlex
import warnings
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Literal

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import Mesh, NamedSharding
from jaxtyping import Array, Bool, Float, PRNGKeyArray, UInt8

from seg4diff_jax.checked import Checked
from seg4diff_jax.checkpoints import Checkpoint, open
from seg4diff_jax.data.loader import Batch, DataSource
from seg4diff_jax.data.record_cache import RecordCache, write_cache
from seg4diff_jax.flow import logit_normal_sigmas
from seg4diff_jax.magnet import adapter_files, encoded_items
from seg4diff_jax.magnet.encoded_items import Turned, conditioning, encoded, encoded_ids
from seg4diff_jax.magnet.held_out import HeldOut, HeldOutData, open_both
from seg4diff_jax.magnet.items import T5_LENGTH, MaskData, Pictures, ViewItems
from seg4diff_jax.magnet.noise_levels import NoiseLevels
from seg4diff_jax.magnet.objective import MagnetBatch, MagnetObjective, magnet_loss
from seg4diff_jax.magnet.targets import averaging_of_ids
from seg4diff_jax.miniature.scenes import Mapped, make_once, scene_sample
from seg4diff_jax.models.attention import ForwardOptions
from seg4diff_jax.models.encoders import Encoders
from seg4diff_jax.models.flops import adapter_step_flops, clip_text_flops, t5_flops, vae_encoder_flops
from seg4diff_jax.models.kernels import Kernel
from seg4diff_jax.models.lora import LoRA, LoRAConfig
from seg4diff_jax.models.mask_head import MaskHead
from seg4diff_jax.models.sd3.model import MMDiT
from seg4diff_jax.parallel import make_mesh, parameter_shardings
from seg4diff_jax.passes import NoisedImages, encode_images
from seg4diff_jax.segmentation.metrics import IGNORED
from seg4diff_jax.training.loop import RunConfig, Task
from seg4diff_jax.training.optimizers import OptimizerConfig
from seg4diff_jax.training.sample_pictures import Denoiser, Samples, asked_for, sample_row
from seg4diff_jax.training.stages import counted, stage
from seg4diff_jax.training.state import name as dotted
from seg4diff_jax.training.throughput import Work

TRAINABLE = nnx.Any(LoRA, nnx.PathContains("head"))
REMATERIALISED: dict[str, bool | Callable] = {
    "nothing": False,
    "blocks": True,
    "all_but_matmuls": jax.checkpoint_policies.dots_with_no_batch_dims_saveable,
}


@dataclass(frozen=True)
class MagnetConfig(Checked):
    """Configuration of the task.

    Attributes:
      model: a model as `seg4diff_jax.load` takes it: directory, single file, Hub id, or miniature.
      tokenizers: directory of tokenizers for single files; null: the checkpoint's own, or SD3's from the Hub.
      t5: whether prompts go through T5 too; in the paper they do not.
      block: the block whose attention is compared with the masks; null: the checkpoint's expert block.
      positions: which tokens of the prompt belong to a class: span, the class's own words; or release, every token that
        also occurs in the class's name.
      start: file or directory of adapters to start from, in any format of `seg4diff convert lora`.
      cache: directory of latents and text states, written if absent, so that steps need neither autoencoder nor text
        encoders. A cache needs data.crop center or squash. Null: the encoders run in every step.
      remat: gradient checkpointing: what a block computes again in the backward pass. nothing, blocks (the whole
        block), or all_but_matmuls (all but the products with weights).
      kernel: the attention kernel; null: chosen by backend and dtype.
      samples: images to generate from the first held-out prompts at each evaluation; null or a count of 0: none.
      dtype: dtype of the frozen checkpoint and of the computation; adapters are fp32.
    """

    run: RunConfig
    model: str
    tokenizers: str | None = None
    t5: bool = False
    block: int | None = None
    data: MaskData = field(default_factory=MaskData)
    held_out: HeldOutData = field(default_factory=HeldOutData)
    lora: LoRAConfig = field(default_factory=LoRAConfig)
    objective: MagnetObjective = field(default_factory=MagnetObjective)
    positions: Literal["span", "release"] = "span"
    noise_levels: NoiseLevels = field(default_factory=NoiseLevels)
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    start: str | None = None
    cache: str | None = None
    remat: Literal["nothing", "blocks", "all_but_matmuls"] = "blocks"
    kernel: Kernel | None = None
    samples: Samples | None = None
    dtype: Literal["float32", "bfloat16"] = "float32"

    def problems(self) -> list[str]:
        """Returns a sentence for each option that does not fit."""
        found = []
        nameless, matching = self.data.nameless, self.objective.targets == "matching"
        if nameless != matching:
            found.append(
                f"data.name is {self.data.name!r}, data.captions {self.data.captions!r} and objective.targets "
                f"{self.objective.targets!r}: masks of sa1b and of captioned pictures have no names and are matched "
                "(matching); those of all others have (classes)"
            )
        if self.positions == "release" and matching:
            found.append("positions is 'release', but matching knows no names whose positions could be read")
        if self.cache is not None and self.data.crop == "random":
            found.append(
                f"cache is {self.cache!r} and data.crop 'random': a cache holds one view of each picture; give "
                "data.crop center or squash, or leave the cache out"
            )
        if asked_for(self.samples) and self.held_out.none_of(self.data):
            found.append("samples show prompts of held-out pictures, and none are: leave samples out, or hold some out")
        return found


class Magnet(nnx.Module):
    """The transformer with adapters, the mask head, and the encoders; no encoders if items are already encoded."""

    def __init__(self, transformer: MMDiT, head: MaskHead | None, encoders: Encoders | None):
        self.transformer, self.head, self.encoders = transformer, head, encoders


def open_checkpoint(config: MagnetConfig) -> Checkpoint:
    """Opens the checkpoint that the options name.

    Raises:
      CheckpointError: the checkpoint cannot be used.
      ValueError: an option does not fit the checkpoint.
    """
    return check(config, open(config.model, t5=config.t5, tokenizers=config.tokenizers))


def check(config: MagnetConfig, checkpoint: Checkpoint) -> Checkpoint:
    """Returns the checkpoint, which needs no weights here. Raises ValueError when an option does not fit it."""
    checkpoint.block(config.block)
    image_size(config, checkpoint)
    if config.samples is not None:
        checkpoint.schedule.check_sampler(config.samples.sampler)
    return checkpoint


def image_size(config: MagnetConfig, checkpoint: Checkpoint) -> int:
    """Returns the side of the model's square input, in pixels. Raises ValueError if the model cannot take that side."""
    side = config.data.size
    try:
        return checkpoint.size(None if side is None else (side, side))[0]
    except ValueError as error:
        raise ValueError(f"data.{error}") from None


def load_encoders(config: MagnetConfig, checkpoint: Checkpoint, mesh: Mesh | None, *, t5: bool = True) -> Encoders:
    """Loads the VAE and the text encoders. T5 is loaded if the checkpoint was opened with T5 and `t5` is True."""
    names = [name for name in checkpoint.encoder_names if t5 or name != checkpoint.family.t5]
    return Encoders(*(checkpoint.component(name, dtype=config.dtype, mesh=mesh) for name in names))


def task(config: MagnetConfig) -> Task:
    # Otherwise every step with a long caption would warn again.
    warnings.filterwarnings("ignore", message=r"prompt .* tokens and .* takes")
    checkpoint = open_checkpoint(config)
    size = image_size(config, checkpoint)
    with stage(f"reading what {config.data.root or config.data.name} holds"):
        pictures, scored = open_both(config.data, config.held_out, size)
    _name_uncaptioned(pictures)
    items = ViewItems(pictures, config.data, size, checkpoint.tokenizers, config.positions)
    held_out = None if scored is None else _held_out(config, checkpoint, scored)
    source, augment = pictures.source, items
    if config.cache is not None:
        mesh = make_mesh(1, jax.local_device_count(), among=jax.local_devices())
        with stage(f"loading {config.model}'s autoencoder and text encoders, {config.dtype}"):
            encoders = load_encoders(config, checkpoint, mesh)
        source, augment = _cached(config, size, pictures, items, encoders), Turned(config.data.flip)
        if held_out is not None:
            with stage(f"encoding {len(held_out.source)} held-out pictures"):
                held_out.encode(encoders)
    return Task(
        name="MAGNET",
        init=partial(init, config, checkpoint),
        loss=partial(loss, config=config, checkpoint=checkpoint),
        source=source,
        augment=augment,
        trainable=TRAINABLE,
        evaluate=None if held_out is None else partial(_evaluate, held_out=held_out),
        pictures=None
        if held_out is None or not asked_for(config.samples)
        else partial(_pictures, held_out=held_out, checkpoint=checkpoint, config=config, kept={}),
        best=None if held_out is None else "miou",
        export=partial(export, config=config),
        item=lambda index: f"{pictures.names[index]} (item {index})",
        work=Work(step_flops(config, checkpoint), config.dtype),
        then=partial(then, config=config),
    )


def _name_uncaptioned(pictures: Pictures) -> None:
    if without := pictures.uncaptioned:
        total = len(pictures.names)
        which = "all" if len(without) == total else ", ".join(without)
        warnings.warn(f"{len(without)} of {total} pictures have no caption: prompt '' for {which}", stacklevel=2)


def step_flops(config: MagnetConfig, checkpoint: Checkpoint) -> int:
    """Returns the FLOPs of a step per picture: the adapters' gradients and, without a cache, the encoders."""
    size, clip_tokens = image_size(config, checkpoint), checkpoint.clip_tokens
    image, t5_tokens = (size // checkpoint.view.multiple) ** 2, T5_LENGTH if config.t5 else 0
    # Zero tokens replace an absent T5. All are equal, so only one of them is computed.
    text = clip_tokens + max(1, t5_tokens)
    flops = adapter_step_flops(checkpoint.transformer, config.lora, image, text, mapped=clip_tokens).needed
    if config.cache is None:
        flops += vae_encoder_flops(checkpoint.vae, size, size)
        flops += sum(clip_text_flops(checkpoint.configs[name], clip_tokens) for name in checkpoint.family.clips)
        flops += t5_flops(checkpoint.configs[checkpoint.family.t5], t5_tokens) if config.t5 else 0
    return flops


def init(config: MagnetConfig, checkpoint: Checkpoint, seed: int, mesh: Mesh) -> Magnet:
    encoders, with_head = None, config.objective.mask_head is not None
    with stage(f"loading {config.model}'s transformer, {config.dtype}"):
        base = checkpoint.component("transformer", dtype=config.dtype, mesh=mesh)
        transformer, head = adapter_files.begin(base, config.lora, config.start, with_head=with_head, seed=seed)
    if config.cache is None:
        with stage(f"loading {config.model}'s autoencoder and text encoders, {config.dtype}"):
            encoders = load_encoders(config, checkpoint, mesh)
    model = Magnet(transformer, head, encoders)
    place = parameter_shardings(mesh)
    state = nnx.state(model, TRAINABLE)
    for path, variable in nnx.to_flat_state(state):
        value = np.asarray(variable.get_value())
        variable.set_value(jax.device_put(value, place(dotted(path), value.shape)))
    nnx.update(model, state)
    return model


# ---- the loss -------------------------------------------------------------------------------------------------------


def loss(
    model: Magnet, batch: Batch, key: PRNGKeyArray, *, config: MagnetConfig, checkpoint: Checkpoint
) -> tuple[Float[Array, ""], dict[str, Float[Array, ""]]]:
    """Returns MAGNET's loss of a batch of items, and its parts. Items are as in `items` or `encoded_items`."""
    for_noise, for_sigma = jax.random.split(key)
    latents = clean_latents(model, batch)
    levels = config.noise_levels
    shift = checkpoint.schedule.shift if levels.shift is None else levels.shift
    joint_dim = model.transformer.config.joint_attention_dim
    if "states" in batch:
        texts = conditioning(batch, joint_dim, checkpoint.clip_tokens)
    else:
        assert model.encoders is not None, "without encoded items the model needs its encoders"
        texts = encoded_ids(model.encoders, batch, joint_dim)
    masks, real, averaging = masks_of(batch, config.objective)
    noise = jax.random.normal(for_noise, latents.shape)
    sigma = logit_normal_sigmas(for_sigma, len(latents), mean=levels.mean, std=levels.std, shift=shift)
    shown = MagnetBatch(
        images=NoisedImages(latents, noise, sigma),
        texts=texts,
        masks=masks,
        real=real,
        averaging=averaging,
    )
    return magnet_loss(
        model.transformer,
        shown,
        config.objective,
        block=checkpoint.block(config.block),
        head=model.head,
        options=ForwardOptions(kernel=config.kernel, remat=REMATERIALISED[config.remat]),
    )


def clean_latents(model: Magnet, batch: Batch) -> Float[Array, "batch rows columns channels"]:
    if "latents" in batch:
        return batch["latents"].astype(jnp.float32)
    assert model.encoders is not None, "without encoded items the model needs its encoders"
    return encode_images(model.encoders.vae, batch["image"])


def masks_of(
    batch: Batch, objective: MagnetObjective
) -> tuple[
    Bool[Array, "batch rows height width"], Bool[Array, "batch rows"], Float[Array, "batch rows clip_tokens"] | None
]:
    """Returns masks, which rows hold a mask, and the prompt-token weights of each mask's class (None for matching)."""
    if objective.targets == "matching":
        return jnp.unpackbits(batch["masks"], axis=-1).astype(bool), batch["real"], None
    rows = batch["class_of_row"]
    masks = (batch["labels"][:, None] == rows[:, :, None, None]) & (rows != IGNORED)[:, :, None, None]
    if "name_ids" not in batch:
        return masks, rows != IGNORED, batch["averaging"]
    averaging, found = averaging_of_ids(batch["clip_l"].astype(jnp.int32), batch["name_ids"])
    return masks, (rows != IGNORED) & found, averaging


# ---- data -----------------------------------------------------------------------------------------------------------


def _cached(config: MagnetConfig, size: int, pictures: Pictures, items: ViewItems, encoders: Encoders) -> DataSource:
    assert config.cache is not None
    data, source = config.data, Mapped(pictures.source, items.fixed)
    names = ("name", "root", "split", "labels", "captions", "names", "crop", "flip", "rows", "least_area")
    identity = {
        **{key: getattr(data, key) for key in names},
        "size": size,
        "count": len(pictures.source),
        "listed": None if data.list is None else encoded_items.hash_of_names(pictures.names),
        "held_out": config.held_out.count if data.name == "folder" and config.held_out.root is None else 0,
        "positions": config.positions,
        "t5": config.t5,
        "dtype": config.dtype,
        "encoders": [encoded_items.sum_of_weights(encoder) for encoder in encoders.parts],
        "files": None if data.root is None else encoded_items.hash_of_files(Path(data.root), Path(config.cache)),
        "captions_size": None if data.captions is None else Path(data.captions).expanduser().stat().st_size,
        "world": scene_sample(size) if data.name == "scenes" else None,
        "classes": None if pictures.classes is None else " ".join(pictures.classes),
    }
    made = lambda: encoded(encoders, source, config.held_out.batch_size, both=data.flip)
    batches = lambda: counted(made(), len(source), "pictures encoded")
    make = lambda directory: write_cache(directory, batches(), len(source), identity)
    make_once(config.cache, make, f"encoding {len(source)} pictures")
    return RecordCache(config.cache, identity)


# ---- what is looked at ----------------------------------------------------------------------------------------------


def _held_out(config: MagnetConfig, checkpoint: Checkpoint, pictures: Pictures) -> HeldOut:
    sigma = checkpoint.schedule.sigma_at(checkpoint.step())
    items = ViewItems(pictures, config.data, image_size(config, checkpoint), checkpoint.tokenizers)
    return HeldOut(pictures, items, config.held_out, block=checkpoint.block(config.block), sigma=sigma)


def _evaluate(model: Magnet, *, held_out: HeldOut) -> dict[str, float]:
    if model.encoders is not None:
        held_out.encode(model.encoders)
    return held_out(model.transformer)


def _pictures(
    model: Magnet, *, held_out: HeldOut, checkpoint: Checkpoint, config: MagnetConfig, kept: dict[Mesh, Encoders]
) -> UInt8[np.ndarray, "height width 3"]:
    """Generates a row of images from held-out prompts, without T5, as for masks.

    `kept` caches, by mesh, the encoders that are loaded when the model has none.
    """
    used = model.encoders
    if used is None:
        place = model.transformer.context_embed.kernel.get_value().sharding
        mesh = place.mesh if isinstance(place, NamedSharding) else None
        assert isinstance(mesh, Mesh), "the loop puts models on its mesh"
        used = kept[mesh] = kept.get(mesh) or load_encoders(config, checkpoint, mesh, t5=False)
    samples = config.samples
    assert samples is not None, "without samples there are no pictures"
    captions, empty = held_out.prompts(checkpoint.tokenizers, samples.count)
    assert used.vae is not None, "encoders of a checkpoint have its autoencoder"
    return sample_row(
        Denoiser(model.transformer, used),
        vae=used.vae,
        captions=captions,
        empty=empty,
        samples=samples,
        schedule=checkpoint.schedule,
    )


def export(model: Magnet, directory: Path, *, config: MagnetConfig) -> None:
    adapter_files.write(directory, config.lora, model.transformer, model.head)


def then(directory: Path, *, config: MagnetConfig) -> dict[str, str]:
    """Returns what can be done with the exported adapters, and the command for each."""
    options = ["--model", config.model, "--lora", str(directory)]
    scored = {"folder": ["--data.root", "DIR"], "sa1b": ["--data.root", "DIR"], "scenes": []}
    images = scored.get(config.data.name, ["--data.name", config.data.name, "--data.root", str(config.data.root)])
    picture = ["photo.jpg", "cat", "background"] if config.data.name != "scenes" else ["photo.png", "ball", "wood"]
    block = [] if config.block is None else [str(config.block)]
    named = [] if config.tokenizers is None else ["--tokenizers", config.tokenizers]
    single, several = ([name, *block] if block else [] for name in ("--block", "--blocks"))
    return {
        "segment a picture with them": shlex.join(["seg4diff", "segment", *picture, *options, *single, *named]),
        "score them on labelled pictures": shlex.join(["python", "evaluate.py", *options, *images, *several]),
    }
