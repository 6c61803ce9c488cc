"""What differs between families of models, as values: components, name tables, schedule, expert block.

SD3 is the first family. All else is the same for every family: how files are read, layers stacked, attention recorded.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, Literal, NamedTuple

from seg4diff_jax.convert.names import Rule
from seg4diff_jax.convert.tables import clip as clip_table
from seg4diff_jax.convert.tables import mmdit as mmdit_table
from seg4diff_jax.convert.tables import t5 as t5_table
from seg4diff_jax.convert.tables import vae as vae_table
from seg4diff_jax.models.clip import CLIPText, CLIPTextConfig
from seg4diff_jax.models.sd3.model import MMDiT, MMDiTConfig
from seg4diff_jax.models.t5 import T5Config, T5Encoder
from seg4diff_jax.models.vae import VAE, VAEConfig

Naming = Literal["diffusers", "stability", "gguf"]
"""Who named the tensors: diffusers and transformers, Stability, or, for T5, llama.cpp."""


class Component(NamedTuple):
    """One component of a checkpoint.

    Attributes:
      config: class of the typed configuration, with `from_json`.
      model: makes the model from the configuration.
      rules: the name table for each naming.
      published: library and class that `model_index.json` names.
      weights: name of the weight file in diffusers' layout, without variant, shard and suffix.
      prefix: prefix of the tensors' names in single files.
      depth: the configuration's key for the number of layers; None if layers are not counted.
      file: name of a file that holds this component alone, without `_fp16` and the suffix; None if there is no such
        file.
      file_pattern: regular expression for `file` and the other names of such a file. Case does not matter.
      tokenizer: folder of the tokenizer that the component needs, and the class that `model_index.json` names for it.
    """

    config: Any
    model: Callable[..., Any]
    rules: Mapping[Naming, Callable[[Any], list[Rule]]]
    published: tuple[str, str]
    weights: str
    prefix: str
    depth: str | None = None
    file: str | None = None
    file_pattern: str = ""
    tokenizer: tuple[str, str] | None = None


class Architecture(NamedTuple):
    """The values that tell a family's published transformers apart."""

    num_layers: int
    width: int
    dual_attention_layers: tuple[int, ...]
    qk_norm: bool


class Family(NamedTuple):
    """A family of models.

    Attributes:
      title: the family's name in messages.
      pipeline: diffusers' class of the pipeline.
      components: components by diffusers' names, in the order in which they are converted.
      clips: names of the CLIPs, in the order in which their states are joined.
      t5: name of the T5, which a checkpoint may lack.
      scheduler: `scheduler_config.json` for checkpoints that have none.
      expert_blocks: the block whose attention segments best, for each architecture with a published one.
      expert_step: the noise level at which the expert block segments best, counted from the clean end of 28.
    """

    title: str
    pipeline: str
    components: Mapping[str, Component]
    clips: tuple[str, ...]
    t5: str
    scheduler: Mapping[str, Any]
    expert_blocks: Mapping[Architecture, int]
    expert_step: int

    @property
    def encoders(self) -> tuple[str, ...]:
        """Names of the VAE and the text encoders, in the order in which they encode."""
        return ("vae", *self.clips, self.t5)

    @property
    def model_index(self) -> dict[str, Any]:
        """The content of `model_index.json` for a checkpoint that has every component."""
        parts = {name: list(component.published) for name, component in self.components.items()}
        tokenizers = [component.tokenizer for component in self.components.values() if component.tokenizer]
        return {
            "_class_name": self.pipeline,
            "scheduler": ["diffusers", self.scheduler["_class_name"]],
            **parts,
            **{folder: ["transformers", kind] for folder, kind in tokenizers},
        }


def _rules(table: Any) -> dict[Naming, Callable[[Any], list[Rule]]]:
    return {"diffusers": table.diffusers, "stability": table.stability}


def _clip(file: str, pattern: str, tokenizer: str) -> Component:
    return Component(
        CLIPTextConfig,
        CLIPText,
        _rules(clip_table),
        published=("transformers", "CLIPTextModelWithProjection"),
        weights="model",
        prefix=f"text_encoders.{file}.transformer.",
        depth="num_hidden_layers",
        file=file,
        file_pattern=pattern,
        tokenizer=(tokenizer, "CLIPTokenizer"),
    )


SD3 = Family(
    title="Stable Diffusion 3 or 3.5",
    pipeline="StableDiffusion3Pipeline",
    components={
        "transformer": Component(
            MMDiTConfig,
            MMDiT,
            _rules(mmdit_table),
            published=("diffusers", "SD3Transformer2DModel"),
            weights="diffusion_pytorch_model",
            prefix="model.diffusion_model.",
            depth="num_layers",
        ),
        "vae": Component(
            VAEConfig,
            VAE,
            _rules(vae_table),
            published=("diffusers", "AutoencoderKL"),
            weights="diffusion_pytorch_model",
            prefix="first_stage_model.",
            file="vae",
            file_pattern=r"(?:sd3(?:\.?5)?[-_])?vae|ae",
        ),
        "text_encoder": _clip("clip_l", r"clip[-_]l", "tokenizer"),
        "text_encoder_2": _clip("clip_g", r"clip[-_]g", "tokenizer_2"),
        "text_encoder_3": Component(
            T5Config,
            T5Encoder,
            {**_rules(t5_table), "gguf": t5_table.gguf},
            published=("transformers", "T5EncoderModel"),
            weights="model",
            prefix="text_encoders.t5xxl.transformer.",
            depth="num_layers",
            file="t5xxl",
            file_pattern=r"(?:google[-_])?t5[-_]?(?:v1_1[-_])?xxl(?:[-_]encoder(?:only)?)?",
            tokenizer=("tokenizer_3", "T5TokenizerFast"),
        ),
    },
    clips=("text_encoder", "text_encoder_2"),
    t5="text_encoder_3",
    scheduler={"_class_name": "FlowMatchEulerDiscreteScheduler", "num_train_timesteps": 1000, "shift": 3.0},
    # Seg4Diff's finding for SD3-medium, whose "9th block" is number 9 counted from 0, and for SD3.5-medium (appendix
    # C). For SD3.5-large nobody has published one.
    expert_blocks={
        Architecture(24, 1536, (), qk_norm=False): 9,
        Architecture(24, 1536, tuple(range(13)), qk_norm=True): 9,
    },
    expert_step=8,
)
