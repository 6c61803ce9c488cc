"""A checkpoint in any form becomes a pipeline in memory."""

from __future__ import annotations

from os import PathLike
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import AxisType, Mesh
from jax.typing import DTypeLike

from convert.components import parse_config
from convert.load import Shardings, open_component
from convert.lora import attach_lora
from convert.progress import Told, counter
from convert.readers import Source
from convert.sources import open_source, with_published_tokenizers
from convert.tokenizers import open_tokenizers
from seg4diff_jax.compilation import keep_compiled_programs
from seg4diff_jax.models.lora import LoRA
from seg4diff_jax.models.mmdit import MMDiT
from seg4diff_jax.numerics import settled
from seg4diff_jax.parallel import AXES, parameter_shardings
from seg4diff_jax.pipeline import Pipeline
from seg4diff_jax.text import Tokenizers

DTYPES = ("float32", "bfloat16")


@settled()
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
    progress: Told = lambda done, total: None,
) -> Pipeline:
    """Load a checkpoint in any form that `python -m convert checkpoint` takes, converted on the fly.

    Compiled programs are kept between processes, in JAX's compilation cache directory if one is configured, otherwise
    in the user's cache; `jax.config.update("jax_enable_compilation_cache", False)` beforehand keeps none.

    Args:
      model: converted directory, diffusers directory, single safetensors file, or Hub id; or "miniature", the small
        SD3 that comes with this package (docs/miniature.md).
      dtype: of parameters and computation, float32 or bfloat16 (float16 overflows in the autoencoder). Default:
        float32 on a CPU, bfloat16 elsewhere.
      mesh: devices to spread parameters and batches over (`seg4diff_jax.parallel.make_mesh`). Default: one device.
      t5: also load T5-XXL. Masks do not need it: the paper's were made without.
      blocks: hold only the first that many blocks of the transformer; masks need those up to the expert block.
      text_encoders: where to take the text encoders from, for single files that hold none; an error where none
        lacks.
      tokenizers: directory with folders `tokenizer` and `tokenizer_2` [and `tokenizer_3`], which single files lack.
        Default: the checkpoint's own, or those that SD3 was published with, from the Hub.
      variant: of a diffusers directory's weight files, as in "fp16", the Hub's default; "" for those of none.
      lora: file or directory with low-rank adapters for the transformer, in any format that `python -m convert lora`
        reads: the Seg4Diff release's `lora_weights.pth`, PEFT's, diffusers' or ours. Those of blocks that are not
        loaded are left out; anything else that would go unused is an error.
      progress: told the bytes of parameters loaded so far and those in all.

    Raises:
      CheckpointError: the checkpoint or the adapters cannot be found, read or understood; the message says what to do.
      ValueError: the dtype, the mesh or `blocks` is of no use here.
    """
    kind = parameter_dtype(dtype)
    keep_compiled_programs()
    if mesh is not None and tuple(mesh.axis_names) != AXES:
        raise ValueError(f"the mesh has axes {mesh.axis_names}; expected {AXES}: seg4diff_jax.parallel.make_mesh()")
    if mesh is not None and {*mesh.axis_types} != {AxisType.Auto}:
        raise ValueError("the mesh's axes are not left to the compiler: take seg4diff_jax.parallel.make_mesh()")
    source, words = open_for_masks(model, t5=t5, text_encoders=text_encoders, tokenizers=tokenizers, variant=variant)
    depth = None if blocks is None else _depth(source, blocks)
    # What configurations say is judged before gigabytes are read, and so is whether adapters fit.
    about: dict[str, Any] = {
        name: getattr(source, name) for name in ("schedule", "expert_block", "expert_step", "trained_size")
    }
    parts = {
        name: open_component(source, name, dtype=kind, depth=depth if name == "transformer" else None)
        for name in source.configs
    }
    adapted = lambda transformer: attach_lora(transformer, str(lora), drop_absent_blocks=True)
    if lora is not None:
        nnx.eval_shape(adapted, parts["transformer"].model)
    shardings = parameter_shardings(mesh) if mesh else None
    read = counter(progress, sum(part.nbytes for part in parts.values()))
    models = {name: part.fill(shardings=shardings, read=read) for name, part in parts.items()}
    if lora is not None:
        models["transformer"] = _adapters_placed(adapted(models["transformer"]), shardings)
    return Pipeline(
        transformer=models["transformer"],
        vae=models["vae"],
        clip_l=models["text_encoder"],
        clip_g=models["text_encoder_2"],
        t5=models.get("text_encoder_3"),
        tokenizers=words,
        mesh=mesh,
        **about,
    )


def _depth(source: Source, blocks: int) -> int:
    most = parse_config("transformer", source.configs["transformer"]).num_layers
    if isinstance(blocks, bool) or not isinstance(blocks, int | np.integer) or not 1 <= blocks <= most:
        raise ValueError(f"blocks is {blocks!r}; expected a whole number from 1 to {most}: {source.origin} has {most}")
    return int(blocks)


def _adapters_placed(transformer: MMDiT, shardings: Shardings | None) -> MMDiT:
    """Adapters where the mesh's rules have them, beside the base's parameters, which are there already."""
    if shardings is not None:
        state = nnx.state(transformer, LoRA)
        for path, variable in nnx.to_flat_state(state):
            value = variable.get_value()
            variable.set_value(jax.device_put(value, shardings(".".join(map(str, path)), value.shape)))
        nnx.update(transformer, state)
    return transformer


def parameter_dtype(dtype: DTypeLike | None) -> jnp.dtype:
    """The dtype to load in; None chooses by backend. Raises ValueError for one that the models do not compute in."""
    if dtype is None:
        return jnp.dtype(jnp.float32 if jax.default_backend() == "cpu" else jnp.bfloat16)
    try:
        kind = jnp.dtype(dtype)
    except TypeError:
        kind = None
    if kind is None or kind.name not in DTYPES:
        raise ValueError(f"dtype is {dtype!r}; expected {' or '.join(DTYPES)}")
    return kind


def open_for_masks(
    model: str | PathLike,
    *,
    t5: bool = False,
    text_encoders: str | PathLike | None = None,
    tokenizers: str | PathLike | None = None,
    variant: str | None = None,
) -> tuple[Source, Tokenizers]:
    """What masks need of a checkpoint, opened: configurations and tokenizers are read, weights are not.

    Raises:
      CheckpointError: something is missing or cannot be read.
    """
    names = ["transformer", "vae", "text_encoder", "text_encoder_2", *(["text_encoder_3"] if t5 else [])]
    folder = Path(tokenizers).expanduser() if tokenizers else None
    second = str(text_encoders) if text_encoders else None
    source = with_published_tokenizers(
        open_source(str(model), components=names, tokenizers=folder, variant=variant, text_encoders=second)
    )
    return source, open_tokenizers(source, t5=t5)
