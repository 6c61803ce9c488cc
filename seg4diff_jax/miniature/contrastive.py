"""The miniature's CLIPs: two text towers and one vision tower, trained on captions and pictures.

Each text tower is scored by itself against the pictures: symmetric InfoNCE over the batch, with a learned temperature
of its own. What SD3 reads of the text towers is their penultimate states; before they are written, these are given
unit size (see `with_unit_states`), which changes nothing else.
"""

from __future__ import annotations

import json
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from jaxtyping import Array, Float, PRNGKeyArray

from seg4diff_jax.analysis.clip_score import unit_vectors
from seg4diff_jax.configuration import infinite
from seg4diff_jax.data.loader import Batch, DataSource, evaluation_batches
from seg4diff_jax.miniature.scenes import (
    SceneConfig,
    SceneItems,
    captioned,
    scene_name,
    training_scenes,
    validation_scenes,
)
from seg4diff_jax.miniature.tokenizer import write_tokenizers
from seg4diff_jax.models.clip import CLIPText, CLIPTextConfig
from seg4diff_jax.models.clip_vision import CLIPVision, CLIPVisionConfig
from seg4diff_jax.parallel import on_host
from seg4diff_jax.passes import to_model_range
from seg4diff_jax.text import Tokenizers, load_tokenizers
from seg4diff_jax.training.loop import RunConfig, Task
from seg4diff_jax.training.optimizers import OptimizerConfig
from seg4diff_jax.training.precision import Dtype
from seg4diff_jax.training.state import fresh

SEEN = ("image", "caption")
HOTTEST = 100.0
"""Largest factor of cosine similarities, as in CLIP."""


@dataclass(frozen=True)
class ContrastiveConfig:
    """Configuration of the task. The three towers have one `projection_dim`; the vocabulary's size is the tokenizer's.

    Attributes:
      position_size: of the text towers' position embeddings at the start, relative to their token embeddings. With
        one layer the transformer reads their sum, and small positions leave each word its own identity.
      unit_states: scale the text towers on export so that their penultimate states have a root mean square of 1.
      dtype: of the computation; parameters are fp32.
      export_dtype: of the written weights.
    """

    run: RunConfig
    clip_l: CLIPTextConfig
    clip_g: CLIPTextConfig
    vision: CLIPVisionConfig
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    data: SceneConfig = field(default_factory=SceneConfig)
    position_size: float = 1.0
    unit_states: bool = True
    dtype: Dtype = "float32"
    export_dtype: Dtype = "float16"

    def __post_init__(self):
        if found := self.problems():
            raise ValueError("\n".join(found))

    def problems(self) -> list[str]:
        """What does not fit, a sentence each."""
        found = infinite(vars(self))
        widths = {self.clip_l.projection_dim, self.clip_g.projection_dim, self.vision.projection_dim}
        if len(widths) > 1:
            found.append(f"projection_dim differs between the towers ({sorted(widths)}); they need one space")
        return found


class Towers(nnx.Module):
    """The three towers and a temperature for each text tower."""

    def __init__(self, config: ContrastiveConfig, *, dtype: Any, rngs: nnx.Rngs):
        self.clip_l = CLIPText(config.clip_l, dtype=dtype, rngs=rngs)
        self.clip_g = CLIPText(config.clip_g, dtype=dtype, rngs=rngs)
        self.vision = CLIPVision(config.vision, dtype=dtype, rngs=rngs)
        for tower in (self.clip_l, self.clip_g):
            positions: Any = tower.position_embedding.embedding
            positions.set_value(config.position_size * positions.get_value())
        self.log_scale = nnx.Param(jnp.full(2, np.log(1 / 0.07), jnp.float32))

    def embed(self, batch: Batch) -> tuple[Float[Array, "batch projection"], list[Float[Array, "batch projection"]]]:
        """Unit vectors of the pictures, and of the captions by each text tower; fp32."""
        pixels = to_model_range(batch["image"])
        texts = [self.clip_l(batch["clip_l"]).pooled, self.clip_g(batch["clip_g"]).pooled]
        return unit_vectors(self.vision(pixels)), [unit_vectors(text) for text in texts]


def task(config: ContrastiveConfig) -> Task:
    with TemporaryDirectory() as directory:
        write_tokenizers(directory)
        tokenizers = load_tokenizers(directory)
    size = len(tokenizers.clip_l)
    texts = {"clip_l": replace(config.clip_l, vocab_size=size), "clip_g": replace(config.clip_g, vocab_size=size)}
    config, data = replace(config, **texts), config.data
    return Task(
        name="contrastive",
        init=fresh(lambda rngs: Towers(config, dtype=jnp.dtype(config.dtype), rngs=rngs)),
        loss=loss,
        source=captioned(training_scenes(data, SEEN), tokenizers),
        evaluate=partial(evaluate, source=captioned(validation_scenes(data, SEEN), tokenizers)),
        best="accuracy",
        export=partial(export, config=config, tokenizers=tokenizers),
        item=scene_name("train"),
    )


def info_nce(
    images: Float[Array, "batch projection"], texts: Float[Array, "batch projection"], scale: Float[Array, ""]
) -> Float[Array, ""]:
    """Symmetric: every picture must pick its text of the batch, and every text its picture."""
    logits = scale * images @ texts.T
    own = jnp.arange(len(images))
    losses = (optax.softmax_cross_entropy_with_integer_labels(side, own).mean() for side in (logits, logits.T))
    return sum(losses, start=jnp.zeros(())) / 2


def loss(towers: Towers, batch: Batch, key: PRNGKeyArray) -> tuple[Float[Array, ""], dict[str, Float[Array, ""]]]:
    """Sum of the two text towers' InfoNCE."""
    images, texts = towers.embed(batch)
    scales = jnp.minimum(jnp.exp(towers.log_scale[...]), HOTTEST)
    losses = [info_nce(images, text, scale) for text, scale in zip(texts, scales, strict=True)]
    return losses[0] + losses[1], {"clip_l": losses[0], "clip_g": losses[1], "scale": scales.mean()}


_embed = jax.jit(Towers.embed)


def evaluate(towers: Towers, *, source: DataSource, choices: int = 16) -> dict[str, float]:
    """How often a picture's own caption is the nearest of `choices`, for each text tower, and the mean: `accuracy`.

    NaN where embeddings are: of similarities that are NaN the first is the largest.
    """
    right: list[np.ndarray] = []
    for batch, count in evaluation_batches(source, choices):
        if count < choices:
            break
        images, texts = _embed(towers, {name: batch[name] for name in ("image", "clip_l", "clip_g")})
        nearest = [on_host((images @ text.T).argmax(axis=1)) for text in texts]
        known = np.stack([np.isfinite(on_host((images @ text.T).sum(axis=1))) for text in texts])
        right.append(np.where(known, np.stack(nearest) == np.arange(choices), np.nan))
    if not right:
        raise ValueError(f"data.validation is {len(source)}; expected at least {choices} scenes")
    clip_l, clip_g = np.concatenate(right, axis=1).mean(axis=1)
    return {"clip_l": float(clip_l), "clip_g": float(clip_g), "accuracy": float((clip_l + clip_g) / 2)}


# ---- export ---------------------------------------------------------------------------------------------------------


def with_unit_states(clip: CLIPText, size: float | Float[Array, ""]) -> CLIPText:
    """The same tower with its residual stream divided by `size`.

    Embeddings and all that is added to the stream are divided; norms undo it wherever the stream is read (up to their
    epsilon), so only penultimate states change: they come out divided by `size`.
    """
    scaled = nnx.clone(clip)
    block: Any = scaled.blocks
    for layer, name in (
        (scaled.token_embedding, "embedding"),
        (scaled.position_embedding, "embedding"),
        *((linear, name) for linear in (block.attention.out, block.down) for name in ("kernel", "bias")),
    ):
        variable = getattr(layer, name)
        variable.set_value(variable.get_value() / size)
    return scaled


def penultimate_size(clip: CLIPText, ids: Array) -> float:
    """Root mean square of the penultimate states, over all positions."""
    states = jax.jit(lambda clip, ids: clip(ids).penultimate.astype(jnp.float32))(clip, ids)
    return float(jnp.sqrt(jnp.square(states).mean()))


def text_config(config: CLIPTextConfig, tokenizer: Any) -> dict[str, Any]:
    """As transformers writes a CLIPTextModelWithProjection's `config.json`; the end token is found as SD3's is."""
    return {
        "architectures": ["CLIPTextModelWithProjection"],
        "model_type": "clip_text_model",
        **{name: getattr(config, name) for name in config.__dataclass_fields__},
        "bos_token_id": tokenizer.bos_token_id,
        "pad_token_id": tokenizer.pad_token_id,
        "dropout": 0.0,
        "attention_dropout": 0.0,
        "initializer_factor": 1.0,
        "initializer_range": 0.02,
    }


def vision_config(config: CLIPVisionConfig) -> dict[str, Any]:
    """As transformers writes a CLIPVisionModelWithProjection's `config.json`."""
    return {
        "architectures": ["CLIPVisionModelWithProjection"],
        "model_type": "clip_vision_model",
        **{name: getattr(config, name) for name in config.__dataclass_fields__},
        "attention_dropout": 0.0,
        "initializer_factor": 1.0,
        "initializer_range": 0.02,
    }


def export(towers: Towers, directory: Path, *, config: ContrastiveConfig, tokenizers: Tokenizers) -> None:
    """Write `text_encoder/`, `text_encoder_2/`, `image_encoder/` and the tokenizers."""
    from seg4diff_jax.convert.staging import staged_directory
    from seg4diff_jax.convert.tables import clip_vision
    from seg4diff_jax.convert.write import write_component, write_index, write_model

    data = config.data
    captions = captioned(SceneItems("train", min(256, data.train), data.size, ("caption",)), tokenizers)
    batch, _ = next(evaluation_batches(captions, len(captions)))
    with staged_directory(directory) as work:
        for name, clip, ids, settings, tokenizer in (
            ("text_encoder", towers.clip_l, batch["clip_l"], config.clip_l, tokenizers.clip_l),
            ("text_encoder_2", towers.clip_g, batch["clip_g"], config.clip_g, tokenizers.clip_g),
        ):
            if config.unit_states:
                clip = with_unit_states(clip, penultimate_size(clip, jnp.asarray(ids)))
            write_component(work, name, text_config(settings, tokenizer), clip, config.export_dtype)
        rules = clip_vision.diffusers(config.vision)
        write_model(
            work / "image_encoder", "model", vision_config(config.vision), towers.vision, rules, config.export_dtype
        )
        preprocessing = {
            "image_processor_type": "CLIPImageProcessor",
            "size": {"shortest_edge": config.vision.image_size},
            "crop_size": {"height": config.vision.image_size, "width": config.vision.image_size},
            "image_mean": [0.5] * 3,
            "image_std": [0.5] * 3,
        }
        (work / "image_encoder" / "preprocessor_config.json").write_text(json.dumps(preprocessing, indent=2))
        write_tokenizers(work)
        write_index(work)
