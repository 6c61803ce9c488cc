"""The miniature's MM-DiT: rectified flow on latents of scenes, with frozen text towers.

    loss = | v(z_sigma, sigma, caption) - (eps - z) |^2,   sigma = sigmoid(N(mean, std))

Latents come from a cache that the first run writes, or from the autoencoder in every step. Text states are computed in
every step: the text towers need about a hundredth of the transformer's operations, and a cache of a caption's states
would be five times as large as a picture's latents.
"""

from __future__ import annotations

import shlex
import shutil
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import Mesh
from jaxtyping import Array, Float, Int, PRNGKeyArray, UInt8

from seg4diff_jax.checked import Checked
from seg4diff_jax.configuration import infinite
from seg4diff_jax.data.loader import Batch, DataSource, Item, evaluation_batches
from seg4diff_jax.data.record_cache import RecordCache, write_cache
from seg4diff_jax.flow import FlowSchedule, logit_normal_sigmas, velocity_target
from seg4diff_jax.miniature.grounding import grounding, grounding_item
from seg4diff_jax.miniature.prompts import PromptItems, Prompts
from seg4diff_jax.miniature.scenes import (
    SceneConfig,
    caption_ids,
    captioned,
    make_once,
    scene_name,
    training_scenes,
)
from seg4diff_jax.miniature.world.shapes import scene
from seg4diff_jax.models.attention import ForwardOptions
from seg4diff_jax.models.encoders import Encoders, TokenIds
from seg4diff_jax.models.kernels import Kernel
from seg4diff_jax.models.sd3.config import MMDiTConfig
from seg4diff_jax.models.sd3.model import MMDiT, patchify, velocity_at
from seg4diff_jax.models.vae import VAE
from seg4diff_jax.parallel import parameter_shardings
from seg4diff_jax.passes import NoisedImages, encode_images, encode_prompts, velocity
from seg4diff_jax.text import Tokenizers, load_tokenizers, tokenize
from seg4diff_jax.training.loop import RunConfig, Task
from seg4diff_jax.training.optimizers import OptimizerConfig
from seg4diff_jax.training.precision import Dtype
from seg4diff_jax.training.sample_pictures import Denoiser, Samples, asked_for, sample_row
from seg4diff_jax.training.stages import counted
from seg4diff_jax.training.state import fresh

TRAINABLE = nnx.All(nnx.PathContains("transformer"), nnx.Param)


@dataclass(frozen=True)
class Objective(Checked):
    """Settings of the loss.

    Attributes:
      mean: mean of the logits of the noise levels, see `flow.logit_normal_sigmas`.
      std: standard deviation of these logits.
      shift: shift of the noise levels.
      image_tokens: how many of a picture's image tokens a step sees, at random positions; null: all.
      caption_dropout: share of captions replaced by the empty prompt, for classifier-free guidance.
      pooled_dropout: share of pooled vectors replaced by zeros, independently of the captions.
    """

    mean: float = 0.0
    std: float = 1.0
    shift: float = 1.0
    image_tokens: int | None = None
    caption_dropout: float = 0.1
    pooled_dropout: float = 0.0

    def problems(self) -> list[str]:
        """Returns a sentence for each option that does not fit."""
        return infinite(vars(self), "objective.")


@dataclass(frozen=True)
class Evaluation(Checked):
    """Settings of the evaluation by zero-shot masks of validation scenes, see `grounding`.

    Attributes:
      sigmas: noise levels at which masks are read.
      batch_size: scenes per batch.
    """

    sigmas: tuple[float, ...] = (0.2, 0.3, 0.5)
    batch_size: int = 16

    def problems(self) -> list[str]:
        """Returns a sentence for each option that does not fit."""
        return infinite(vars(self), "evaluation.")


@dataclass(frozen=True)
class FlowMatchingConfig(Checked):
    """Configuration of the task.

    Attributes:
      vae: directory that a run of the autoencoder task has exported.
      text: directory that a run of the contrastive task has exported.
      start: directory of a checkpoint whose transformer is trained further; null: start from random weights.
      cache: directory of cached latents, written if absent; null: the autoencoder runs in every step.
      prompts: how captions become prompts.
      kernel: the attention kernel; null: chosen by backend and dtype.
      samples: images to generate at each evaluation; null or a count of 0: none.
      inference_shift: shift of the exported checkpoint's schedule.
      dtype: dtype of the computation; trained parameters are fp32.
      export_dtype: dtype of the exported weights.
    """

    run: RunConfig
    model: MMDiTConfig
    vae: str
    text: str
    start: str | None = None
    cache: str | None = None
    prompts: Prompts = field(default_factory=Prompts)
    kernel: Kernel | None = None
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    data: SceneConfig = field(default_factory=SceneConfig)
    objective: Objective = field(default_factory=Objective)
    evaluation: Evaluation = field(default_factory=Evaluation)
    samples: Samples | None = field(default_factory=Samples)
    inference_shift: float = 3.0
    dtype: Dtype = "float32"
    export_dtype: Dtype = "float16"

    def problems(self) -> list[str]:
        """Returns a sentence for each option that does not fit."""
        found = infinite(vars(self))
        if self.prompts.filled and self.cache is None:
            found.append("prompts.filled needs the cached scenes' labels: give cache a directory, or leave it out")
        return found


def task(config: FlowMatchingConfig) -> Task:
    tokenizers = load_tokenizers(config.text)
    empty = TokenIds(**{name: ids[None] for name, ids in caption_ids(tokenizers, "").items()})
    validation, source = _sources(config, tokenizers)
    return Task(
        name="flow matching",
        init=partial(init, config),
        loss=partial(
            loss,
            objective=config.objective,
            empty=empty,
            kernel=config.kernel,
        ),
        source=source,
        trainable=TRAINABLE,
        evaluate=partial(
            grounding, source=validation, sigmas=config.evaluation.sigmas, batch_size=config.evaluation.batch_size
        ),
        pictures=_pictures(config, config.samples, tokenizers, empty) if asked_for(config.samples) else None,
        best="miou",
        export=partial(export, config=config, validation=validation),
        item=scene_name("train"),
        then=lambda directory: {"score its masks": f"python evaluate.py --model {shlex.quote(str(directory))}"},
    )


def init(config: FlowMatchingConfig, seed: int, mesh: Mesh) -> Denoiser:
    from seg4diff_jax.convert.load import load_component

    dtype = jnp.dtype(config.dtype)
    load = partial(load_component, dtype=dtype, shardings=parameter_shardings(mesh))
    transformer = fresh(partial(new_transformer, config.model, dtype=dtype))(seed, mesh)
    if config.start is not None:
        former = load_component(config.start, "transformer", dtype=jnp.float32, shardings=parameter_shardings(mesh))
        nnx.update(transformer, nnx.state(former))
    vae: Any = load(config.vae, "vae") if config.cache is None else None
    towers: Any = [load(config.text, name) for name in ("text_encoder", "text_encoder_2")]
    return Denoiser(transformer, Encoders(vae, *towers))


def new_transformer(config: MMDiTConfig, rngs: nnx.Rngs, *, dtype: Any = jnp.float32) -> MMDiT:
    """Makes a transformer whose blocks start as the identity and whose velocity starts at zero (adaLN-zero)."""
    model = MMDiT(config, dtype=dtype, rngs=rngs)
    linears = [model.norm_out, model.proj_out]
    linears += [stream.modulation for stack in model.stacks for stream in (stack.image, stack.text)]
    for linear in linears:
        linear.kernel.set_value(jnp.zeros_like(linear.kernel.get_value()))
    return model


# ---- the loss -------------------------------------------------------------------------------------------------------


def loss(
    denoiser: Denoiser,
    batch: Batch,
    key: PRNGKeyArray,
    *,
    objective: Objective,
    empty: TokenIds,
    kernel: Kernel | None = None,
) -> tuple[Float[Array, ""], dict[str, Float[Array, ""]]]:
    """Returns the mean squared error of the velocity. `batch` has `latents` or `image`, and `clip_l` and `clip_g`."""
    for_noise, for_sigma, for_caption, for_pooled, for_tokens = jax.random.split(key, 5)
    latents = clean_latents(denoiser, batch)
    count, tokens, zeros = len(latents), batch["clip_l"].shape[1], empty.clip_l.shape[1]
    dropped = jax.random.bernoulli(for_caption, objective.caption_dropout, (count,))
    ids = TokenIds(
        jnp.where(dropped[:, None], empty.clip_l[:, :tokens], batch["clip_l"].astype(jnp.int32)),
        jnp.where(dropped[:, None], empty.clip_g[:, :tokens], batch["clip_g"].astype(jnp.int32)),
    )
    joint_dim = denoiser.transformer.config.joint_attention_dim
    texts = encode_prompts(denoiser.encoders, ids, joint_dim=joint_dim, t5_length=zeros)
    without = jax.random.bernoulli(for_pooled, objective.pooled_dropout, (count, 1))
    texts = replace(texts, pooled=jnp.where(without, 0, texts.pooled))
    noise = jax.random.normal(for_noise, latents.shape)
    sigma = logit_normal_sigmas(for_sigma, count, mean=objective.mean, std=objective.std, shift=objective.shift)
    images, target = NoisedImages(latents, noise, sigma), velocity_target(latents, noise)
    options = ForwardOptions(kernel=kernel)
    if objective.image_tokens is None:
        predicted, _ = velocity(denoiser.transformer, images, texts, options=options)
    else:
        target = patchify(target, denoiser.transformer.config.patch_size)
        seen = random_tokens(for_tokens, count, target.shape[1], objective.image_tokens)
        predicted = velocity_at(denoiser.transformer, *images.inputs(), texts, tokens=seen, options=options)
        target = jnp.take_along_axis(target, seen[..., None], axis=1)
    return jnp.square(predicted.astype(jnp.float32) - target).mean(), {}


def random_tokens(key: PRNGKeyArray, images: int, tokens: int, kept: int) -> Int[Array, "{images} {kept}"]:
    """Draws the indices of `kept` different tokens of each image."""
    return jnp.argsort(jax.random.uniform(key, (images, tokens)), axis=1)[:, :kept]


def clean_latents(denoiser: Denoiser, batch: Batch) -> Float[Array, "batch rows columns channels"]:
    if "latents" in batch:
        return batch["latents"].astype(jnp.float32)
    assert denoiser.encoders.vae is not None, "without cached latents the model needs its autoencoder"
    return encode_images(denoiser.encoders.vae, batch["image"])


# ---- data -----------------------------------------------------------------------------------------------------------


class GroundingItems:
    """A data source of validation scenes: pictures with the fields of `grounding_item`."""

    def __init__(self, config: SceneConfig, tokenizers: Tokenizers):
        self.config, self.tokenizers = config, tokenizers

    def __len__(self) -> int:
        return self.config.validation

    def __getitem__(self, index: int, /) -> Item:
        shown = scene("validation", index, self.config.size)
        return {"image": shown.image, **grounding_item(shown, self.tokenizers)}


class InMemory:
    """A data source of items that are held in memory."""

    def __init__(self, items: list[Item]):
        self.items = items

    def __len__(self) -> int:
        return len(self.items)

    def __getitem__(self, index: int, /) -> Item:
        return self.items[index]


def _sources(config: FlowMatchingConfig, tokenizers: Tokenizers) -> tuple[DataSource, DataSource]:
    """Makes validation and training items. The autoencoder is in memory only while the items are made."""
    from seg4diff_jax.convert.load import load_component

    data = config.data
    train = captioned(training_scenes(data), tokenizers)
    vae = load_component(config.vae, "vae", dtype=jnp.float32)
    seen = with_latents(vae, GroundingItems(data, tokenizers), config.evaluation.batch_size)
    validation = InMemory(
        [{field: values[i] for field, values in batch.items()} for batch in seen for i in _rows(batch)]
    )
    if config.cache is None:
        return validation, PromptItems(train, config.prompts, tokenizers)
    identity = {"split": "train", "size": data.size, "count": data.train, "vae": _fingerprint(vae)}
    encoded = lambda: counted(with_latents(vae, train, 64), data.train, "scenes encoded")
    write = lambda directory: write_cache(directory, encoded(), data.train, identity)
    make_once(config.cache, write, f"encoding {data.train} scenes")
    cached = RecordCache(config.cache, identity)
    return validation, PromptItems(cached, config.prompts, tokenizers)


def _rows(batch: dict[str, np.ndarray]) -> range:
    return range(len(next(iter(batch.values()))))


def _fingerprint(vae: VAE) -> float:
    """Returns the sum of an autoencoder's absolute weights, which differs from that of other autoencoders."""
    return float(sum(np.abs(np.asarray(leaf, np.float64)).sum() for leaf in jax.tree.leaves(nnx.state(vae))))


def with_latents(vae: VAE, source: DataSource, batch_size: int) -> Iterator[dict[str, np.ndarray]]:
    """Yields batches of a source's items: `image` replaced by `latents` in fp16, token ids uint16, no `index`."""
    for batch, count in evaluation_batches(source, batch_size):
        latents = np.asarray(encode_images(vae, batch.pop("image")), np.float16)
        ids = {name: batch[name].astype(np.uint16) for name in ("clip_l", "clip_g")}
        del batch["index"]
        yield {name: values[:count] for name, values in {**batch, **ids, "latents": latents}.items()}


def _pictures(
    config: FlowMatchingConfig, samples: Samples, tokenizers: Tokenizers, empty: TokenIds
) -> Callable[[Denoiser], UInt8[np.ndarray, "height width 3"]]:
    from seg4diff_jax.convert.load import load_component

    captions = [scene("validation", index, config.data.size).caption for index in range(samples.count)]
    return partial(
        sample_row,
        vae=load_component(config.vae, "vae", dtype=jnp.dtype(config.dtype)),
        captions=tokenize(tokenizers, captions),
        empty=empty,
        samples=samples,
        schedule=FlowSchedule(config.inference_shift),
    )


# ---- export ---------------------------------------------------------------------------------------------------------


def diffusers_config(config: MMDiTConfig, expert_block: int) -> dict[str, Any]:
    """Returns the `config.json` that diffusers writes for an SD3Transformer2DModel, with the expert block added."""
    return {
        "_class_name": "SD3Transformer2DModel",
        **asdict(config),
        "qk_norm": "rms_norm" if config.qk_norm else None,
        "dual_attention_layers": list(config.dual_attention_layers),
        "expert_block": expert_block,
    }


def export(denoiser: Denoiser, directory: Path, *, config: FlowMatchingConfig, validation: DataSource) -> None:
    """Writes the whole checkpoint: this task's transformer, and the other components as earlier tasks exported them."""
    from seg4diff_jax.convert.staging import staged_directory
    from seg4diff_jax.convert.write import write_component, write_index

    evaluation = config.evaluation
    scores = grounding(denoiser, validation, sigmas=evaluation.sigmas, batch_size=evaluation.batch_size)
    with staged_directory(directory) as work:
        shutil.copytree(Path(config.vae) / "vae", work / "vae")
        for name in ("text_encoder", "text_encoder_2", "tokenizer", "tokenizer_2", "image_encoder"):
            shutil.copytree(Path(config.text) / name, work / name)
        settings = diffusers_config(config.model, int(scores["block"]))
        write_component(work, "transformer", settings, denoiser.transformer, config.export_dtype)
        write_index(work, {"shift": config.inference_shift})
