"""Opens a checkpoint in any form, and loads it as a pipeline.

`open` reads a checkpoint's configurations and tokenizers. `load` also reads its weights, which are gigabytes. Code that
works with a model opens it once, asks the `Checkpoint` what the job needs to know, and only then loads it.
"""

from __future__ import annotations

import gc
from dataclasses import dataclass
from functools import cached_property
from os import PathLike
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import AxisType, Mesh
from jax.typing import DTypeLike

from seg4diff_jax.batching import ModelView
from seg4diff_jax.compilation import keep_compiled_programs
from seg4diff_jax.convert.errors import CheckpointError
from seg4diff_jax.convert.families import SD3, Family
from seg4diff_jax.convert.load import Shardings, open_component
from seg4diff_jax.convert.lora.adapters import attach_lora
from seg4diff_jax.convert.progress import OnBytes, counter
from seg4diff_jax.convert.readers import Source
from seg4diff_jax.convert.sources.open import open_source, with_published_tokenizers
from seg4diff_jax.convert.tokenizers import open_tokenizers
from seg4diff_jax.flow import FlowSchedule
from seg4diff_jax.models.encoders import Encoders
from seg4diff_jax.models.lora import LoRA
from seg4diff_jax.models.sd3.model import MMDiT, MMDiTConfig
from seg4diff_jax.models.vae import VAEConfig
from seg4diff_jax.numerics import settled
from seg4diff_jax.parallel import AXES, parameter_shardings
from seg4diff_jax.pipeline import Pipeline
from seg4diff_jax.text import Tokenizers

DTYPES = ("float32", "bfloat16")


def open(
    model: str | PathLike,
    *,
    t5: bool = False,
    text_encoders: str | PathLike | None = None,
    tokenizers: str | PathLike | None = None,
    variant: str | None = None,
) -> Checkpoint:
    """Reads a checkpoint's configurations and tokenizers. Its weights are not read.

    Args:
      model: converted directory, diffusers directory, single .safetensors or .gguf file, or Hub id; or "miniature", the
        small SD3 that comes with this package (docs/miniature.md).
      t5: also open T5-XXL. Masks do not need it: the paper's were made without.
      text_encoders: checkpoint to take the text encoders from, for a single file that holds none. An error if the model
        lacks no text encoder.
      tokenizers: directory with folders `tokenizer` and `tokenizer_2` [and `tokenizer_3`], which single files lack.
        Default: the checkpoint's own, or those that SD3 was published with, from the Hub.
      variant: which weight files of a diffusers directory to read, such as "fp16"; "" reads those without a variant in
        their names. Default: these, or the only variant there is; from the Hub "fp16" where there is one.

    Raises:
      CheckpointError: the checkpoint cannot be found, read or understood; the message says what to do.
    """
    names = [name for name in SD3.components if t5 or name != SD3.t5]
    folder = Path(tokenizers).expanduser() if tokenizers else None
    second = str(text_encoders) if text_encoders else None
    source = with_published_tokenizers(
        open_source(str(model), components=names, tokenizers=folder, variant=variant, text_encoders=second)
    )
    return Checkpoint(source, open_tokenizers(source, t5=t5))


def load(
    model: str | PathLike,
    *,
    dtype: DTypeLike | None = None,
    mesh: Mesh | None = None,
    t5: bool = False,
    blocks: int | None = None,
    text_encoders: str | PathLike | None = None,
    tokenizers: str | PathLike | None = None,
    variant: str | None = None,
    lora: str | PathLike | None = None,
    on_progress: OnBytes = lambda done, total: None,
) -> Pipeline:
    """Opens and loads a checkpoint, and converts it on the way. `open` and `Checkpoint.load` explain the arguments.

    Raises:
      CheckpointError: the checkpoint or the adapters cannot be found, read or understood; the message says what to do.
      ValueError: the dtype, the mesh or `blocks` cannot be used.
    """
    parameter_dtype(dtype)
    _check_mesh(mesh)
    opened = open(model, t5=t5, text_encoders=text_encoders, tokenizers=tokenizers, variant=variant)
    return opened.load(dtype=dtype, mesh=mesh, blocks=blocks, lora=lora, on_progress=on_progress)


@dataclass(frozen=True)
class Checkpoint:
    """A checkpoint whose configurations and tokenizers have been read. Its weights have not.

    Attributes:
      source: the files that hold configurations and weights.
      tokenizers_read: None for a model that is described by its configurations alone, without tokenizers.
    """

    source: Source
    tokenizers_read: Tokenizers | None

    def __repr__(self) -> str:
        return f"Checkpoint({self.source.origin}: {', '.join(self.source.configs)})"

    # ---- what it says -----------------------------------------------------------------------------------------------

    @property
    def configs(self) -> dict[str, Any]:
        """Each component's configuration, such as a `CLIPTextConfig`. Raises CheckpointError if one is damaged."""
        return self.source.parsed

    @property
    def transformer(self) -> MMDiTConfig:
        return self.configs["transformer"]

    @property
    def vae(self) -> VAEConfig:
        return self.configs["vae"]

    @property
    def family(self) -> Family:
        return self.source.family

    @property
    def encoder_names(self) -> tuple[str, ...]:
        """Names of the VAE and of the text encoders, in the order of `Encoders`."""
        return tuple(name for name in self.family.encoders if name in self.source.configs)

    @property
    def t5(self) -> bool:
        """Whether T5 was opened too."""
        return self.family.t5 in self.source.configs

    @property
    def tokenizers(self) -> Tokenizers:
        """The checkpoint's tokenizers. Raises CheckpointError if only the model's configurations were given."""
        if self.tokenizers_read is None:
            raise CheckpointError(
                f"{self.source.origin} is described by its configurations alone: it has no tokenizers"
            )
        return self.tokenizers_read

    @property
    def clip_tokens(self) -> int:
        """Length of a CLIP prompt, in tokens."""
        if self.tokenizers_read is None:
            return self.configs[self.family.clips[0]].max_position_embeddings
        return self.tokenizers.clip_l.model_max_length

    @cached_property
    def schedule(self) -> FlowSchedule:
        """The checkpoint's noise levels. Raises CheckpointError for a scheduler that is not SD3's kind."""
        return self.source.schedule

    @property
    def trained_size(self) -> int:
        """Side, in pixels, of the square images that the transformer was trained for."""
        return self.source.trained_size

    @property
    def view(self) -> ModelView:
        """The sizes at which the model sees images."""
        return ModelView.of(self.transformer, self.vae, self.trained_size)

    # ---- what is asked of it ----------------------------------------------------------------------------------------

    def block(self, block: int | None = None) -> int:
        """Returns the number of the block to read. Default: the expert block, whose attention segments best.

        Raises ValueError if the model has no such block, or if the default is asked for and no expert block is known.
        """
        last = self.transformer.num_layers - 1
        chosen = self.source.expert_block if block is None else block
        if chosen is None:
            raise ValueError(f"{self.source.origin} does not say which block segments best: name block, 0 to {last}")
        if isinstance(chosen, bool) or not isinstance(chosen, int | np.integer) or not 0 <= chosen <= last:
            raise ValueError(f"block is {chosen!r}; {self.source.origin} has blocks 0..{last}")
        return int(chosen)

    def step(self, step: int | None = None) -> int:
        """Returns the noise level to read at, as a step. Default: the checkpoint's own.

        Raises ValueError if there is no such step.
        """
        chosen = self.source.expert_step if step is None else step
        self.schedule.sigma_at(chosen)
        return chosen

    def size(self, size: tuple[int, int] | None = None) -> tuple[int, int]:
        """Returns the height and width of images. Default: the trained square. Raises ValueError if they do not fit."""
        return self.view.size((0, 0), size, "square")

    # ---- weights ----------------------------------------------------------------------------------------------------

    def component(self, name: str, *, dtype: DTypeLike | None = None, mesh: Mesh | None = None) -> Any:
        """Loads one component with its parameters, such as the `VAE`. `dtype` and `mesh` are as for `load`."""
        place = None if mesh is None else parameter_shardings(mesh)
        return open_component(self.source, name, dtype=parameter_dtype(dtype)).fill(shardings=place)

    @settled()
    def load(
        self,
        *,
        dtype: DTypeLike | None = None,
        mesh: Mesh | None = None,
        blocks: int | None = None,
        lora: str | PathLike | None = None,
        on_progress: OnBytes = lambda done, total: None,
    ) -> Pipeline:
        """Reads the weights and returns a pipeline.

        Compiled programs are kept between processes: in JAX's compilation cache directory if one is configured,
        otherwise in the user's cache. `jax.config.update("jax_enable_compilation_cache", False)` before this call
        keeps none.

        Args:
          dtype: of parameters and computation, float32 or bfloat16 (float16 overflows in the autoencoder). Default:
            float32 on a CPU, bfloat16 elsewhere.
          mesh: devices to spread parameters and batches over (`seg4diff_jax.parallel.make_mesh`). Default: one device.
          blocks: load only this many blocks of the transformer, from the first; masks need those up to the expert
            block.
          lora: file or directory with low-rank adapters for the transformer, in any format that `seg4diff convert
            lora` reads: the Seg4Diff release's `lora_weights.pth`, PEFT's, diffusers' or ours. Adapters of blocks that
            are not loaded are left out; anything else that would go unused is an error.
          on_progress: called with the bytes of parameters loaded so far, and with those of all parameters.

        Raises:
          CheckpointError: weights or adapters cannot be found, read or understood; the message says what to do.
          ValueError: the dtype, the mesh or `blocks` cannot be used.
        """
        kind = parameter_dtype(dtype)
        _check_mesh(mesh)
        keep_compiled_programs()
        depth = None if blocks is None else self._depth(blocks)
        # Configurations are checked before gigabytes are read, and so is whether the adapters fit.
        about: dict[str, Any] = {
            "schedule": self.schedule,
            "expert_block": self.source.expert_block,
            "expert_step": self.source.expert_step,
            "trained_size": self.trained_size,
        }
        parts = {
            name: open_component(self.source, name, dtype=kind, depth=depth if name == "transformer" else None)
            for name in self.source.configs
        }
        adapted = lambda transformer: attach_lora(transformer, str(lora), drop_absent_blocks=True)
        if lora is not None:
            nnx.eval_shape(adapted, parts["transformer"].model)
        shardings = parameter_shardings(mesh) if mesh else None
        read = counter(on_progress, sum(part.nbytes for part in parts.values()))
        models = {name: part.fill(shardings=shardings, read=read) for name, part in parts.items()}
        if lora is not None:
            models["transformer"] = _adapters_placed(adapted(models["transformer"]), shardings)
        pipe = Pipeline(
            transformer=models["transformer"],
            encoders=Encoders(*(models[name] for name in self.encoder_names)),
            tokenizers=self.tokenizers,
            mesh=mesh,
            **about,
        )
        # nnx.merge leaves reference cycles, which would keep the weights in memory after the pipeline is deleted.
        gc.collect()
        return pipe

    def _depth(self, blocks: int) -> int:
        most, whose = self.transformer.num_layers, self.source.origin
        if isinstance(blocks, bool) or not isinstance(blocks, int | np.integer) or not 1 <= blocks <= most:
            raise ValueError(f"blocks is {blocks!r}; expected a whole number from 1 to {most}: {whose} has {most}")
        return int(blocks)


def _check_mesh(mesh: Mesh | None) -> None:
    if mesh is not None and tuple(mesh.axis_names) != AXES:
        raise ValueError(f"the mesh has axes {mesh.axis_names}; expected {AXES}: seg4diff_jax.parallel.make_mesh()")
    if mesh is not None and {*mesh.axis_types} != {AxisType.Auto}:
        raise ValueError("the mesh's axes are not left to the compiler: take seg4diff_jax.parallel.make_mesh()")


def _adapters_placed(transformer: MMDiT, shardings: Shardings | None) -> MMDiT:
    """Moves adapters to their devices by the mesh's rules. The base's parameters are on their devices already."""
    if shardings is not None:
        state = nnx.state(transformer, LoRA)
        for path, variable in nnx.to_flat_state(state):
            value = variable.get_value()
            variable.set_value(jax.device_put(value, shardings(".".join(map(str, path)), value.shape)))
        nnx.update(transformer, state)
    return transformer


def parameter_dtype(dtype: DTypeLike | None) -> jnp.dtype:
    """Returns the dtype to load in. None: float32 on a CPU, bfloat16 elsewhere.

    Raises ValueError for a dtype that the models do not compute in.
    """
    if dtype is None:
        return jnp.dtype(jnp.float32 if jax.default_backend() == "cpu" else jnp.bfloat16)
    try:
        kind = jnp.dtype(dtype)
    except TypeError:
        kind = None
    if kind is None or kind.name not in DTYPES:
        raise ValueError(f"dtype is {dtype!r}; expected {' or '.join(DTYPES)}")
    return kind
