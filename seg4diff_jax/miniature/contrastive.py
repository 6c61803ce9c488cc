"""The miniature's CLIPs: two text towers and one vision tower, trained on captions and pictures.

Each text tower has its own loss against the pictures: symmetric InfoNCE over the batch, with its own learned
temperature. SD3 reads the penultimate states of the text towers. On export the towers are scaled so that these states
have a root mean square of 1 (see `with_unit_states`), which changes nothing else.
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
from seg4diff_jax.checked import Checked
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
class ContrastiveConfig(Checked):
    """Configuration of the task. All three towers need the same `projection_dim`; the tokenizer sets `vocab_size`.

    Attributes:
      position_size: initial size of the text towers' position embeddings, relative to their token embeddings. A tower
        of one layer gives SD3 the sum of both, and small position embeddings keep words distinct.
      unit_states: scale the text towers on export so that their penultimate states have a root mean square of 1.
      dtype: dtype of the computation; parameters are fp32.
      export_dtype: dtype of the exported weights.
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

    def problems(self) -> list[str]:
        """Returns a sentence for each option that does not fit."""
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
        """Returns unit vectors of the pictures, and of the captions for each text tower, fp32."""
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
    """Returns the symmetric InfoNCE loss: each picture must find its text in the batch, and each text its picture."""
    logits = scale * images @ texts.T
    own = jnp.arange(len(images))
    losses = (optax.softmax_cross_entropy_with_integer_labels(side, own).mean() for side in (logits, logits.T))
    return sum(losses, start=jnp.zeros(())) / 2


def loss(towers: Towers, batch: Batch, key: PRNGKeyArray) -> tuple[Float[Array, ""], dict[str, Float[Array, ""]]]:
    """Returns the sum of the two text towers' InfoNCE losses, and its parts."""
    images, texts = towers.embed(batch)
    scales = jnp.minimum(jnp.exp(towers.log_scale[...]), HOTTEST)
    losses = [info_nce(images, text, scale) for text, scale in zip(texts, scales, strict=True)]
    return losses[0] + losses[1], {"clip_l": losses[0], "clip_g": losses[1], "scale": scales.mean()}


_embed = jax.jit(Towers.embed)


def evaluate(towers: Towers, *, source: DataSource, choices: int = 16) -> dict[str, float]:
    """Returns how often a picture's caption is the nearest of `choices`, per text tower, and the mean, `accuracy`.

    Accuracies are NaN where embeddings are NaN: the argmax of NaN similarities would be the first caption.
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
    """Returns the tower with its residual stream divided by `size`.

    The embeddings and all outputs that are added to the stream are divided. Every reader of the stream begins with a
    norm, which undoes the division (up to its epsilon). So only the penultimate states change: they are divided by
    `size`.
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
    """Returns the root mean square of the penultimate states over all positions."""
    states = jax.jit(lambda clip, ids: clip(ids).penultimate.astype(jnp.float32))(clip, ids)
    return float(jnp.sqrt(jnp.square(states).mean()))


def text_config(config: CLIPTextConfig, tokenizer: Any) -> dict[str, Any]:
    """Returns the `config.json` that transformers writes for a CLIPTextModelWithProjection.

    The end token is found in the same way as SD3's.
    """
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
    """Returns the `config.json` that transformers writes for a CLIPVisionModelWithProjection."""
    return {
        "architectures": ["CLIPVisionModelWithProjection"],
        "model_type": "clip_vision_model",
        **{name: getattr(config, name) for name in config.__dataclass_fields__},
        "attention_dropout": 0.0,
        "initializer_factor": 1.0,
        "initializer_range": 0.02,
    }


def export(towers: Towers, directory: Path, *, config: ContrastiveConfig, tokenizers: Tokenizers) -> None:
    """Writes `text_encoder/`, `text_encoder_2/`, `image_encoder/` and the tokenizers."""
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
