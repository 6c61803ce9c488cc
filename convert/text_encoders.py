"""Text encoders, and a VAE, from elsewhere: most single files hold a transformer and a VAE, or a transformer alone."""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path

from convert.components import COMPONENTS, parse_config, tokenizers_of
from convert.container import SUFFIXES
from convert.errors import CheckpointError, raise_all
from convert.readers import MODEL_INDEX, Source
from convert.single_file import of_tensors
from convert.weight_files import read_weights

FILES = {"text_encoder": "clip_l", "text_encoder_2": "clip_g", "text_encoder_3": "t5xxl"}
"""What Stability calls a text encoder's own file, without what follows (`_fp16`) and the suffix."""
STEMS = {**FILES, "text_encoder_3": r"t5xxl|t5-v1_1-xxl-encoder"}
"""The same as patterns, with what T5's encoder is called as GGUF."""
FORMS = (
    "a diffusers directory, a converted directory, a single file that has text encoders, or a directory with "
    "clip_l.safetensors, clip_g.safetensors [and t5xxl_fp16.safetensors, or T5's encoder as GGUF]; a VAE is in the "
    "first three"
)


def remedy(source: str | Path) -> str:
    """What to do about a checkpoint that lacks text encoders."""
    return (
        "Stability's sd3_medium.safetensors and sd3.5_*.safetensors come without text encoders, files of a transformer "
        "alone, such as GGUF, without a VAE too. Give them as "
        "text_encoders=DIR (--text-encoders DIR in commands), or convert once with `python -m convert checkpoint "
        f"{source} DST --text-encoders DIR`; DIR is {FORMS}"
    )


def folder_of_files(directory: Path) -> Path | None:
    """Where under `directory` each text encoder lies in a file of its own, as in Stability's `text_encoders`."""
    folders = (directory, directory / "text_encoders")
    return next((each for each in folders if any(_files(each, name) for name in FILES)), None)


def open_files(folder: Path, variant: str | None) -> Source:
    """Text encoders in separate files. Their tensors are named as in a single file, without the prefix, or as GGUF."""
    paths = {name: path for name in FILES if (path := _choose(folder, name, variant)) is not None}
    return of_tensors(str(folder), {name: (path, "", read_weights(path)) for name, path in paths.items()})


def encoder_of_file(path: Path) -> str | None:
    """The text encoder whose file this is, by its name."""
    return next((name for name in FILES if _variant(path.name, name) is not None), None)


def open_file(path: Path) -> Source:
    """One text encoder in a file of its own."""
    return of_tensors(str(path), {str(encoder_of_file(path)): (path, "", read_weights(path))})


def _variant(file: str, name: str) -> str | None:
    """What follows the name of a text encoder's file, as in `fp16`; "" for nothing, None for another file."""
    suffixes = "|".join(map(re.escape, SUFFIXES))
    found = re.fullmatch(rf"(?:{STEMS[name]})(?:[-_.](?P<variant>.+))?(?:{suffixes})", file)
    return None if found is None else found["variant"] or ""


def _files(folder: Path, name: str) -> dict[str, list[Path]]:
    """By variant, the files in which a text encoder lies."""
    found: dict[str, list[Path]] = {}
    for path in sorted(folder.iterdir()) if folder.is_dir() else ():
        if (variant := _variant(path.name, name)) is not None:
            found.setdefault(variant, []).append(path)
    return found


def _choose(folder: Path, name: str, variant: str | None) -> Path | None:
    """Of `t5xxl_fp16`, `t5xxl_fp8_e4m3fn` ... the one of the variant, the plain or only one, or the fp16 one."""
    found = _files(folder, name)
    for choice in (variant, "", *(found if len(found) == 1 else ()), "fp16"):
        if len(paths := found.get(choice or "", [])) == 1:
            return paths[0]
    if found:
        files = sorted(
            path.stem if path.suffix == ".safetensors" else path.name for each in found.values() for path in each
        )
        raise CheckpointError(f"{folder}: which of {', '.join(files)}? Name what follows {FILES[name]}_ with --variant")
    return None


def missing(source: Source, wanted: list[str] | None) -> list[str]:
    """The VAE and text encoders that a checkpoint lacks, of those wanted (default: all)."""
    return [name for name in ("vae", *FILES) if name not in source.configs and (wanted is None or name in wanted)]


def completed(source: Source, second: Source, names: list[str]) -> Source:
    """`source` with what `second` has of the components `names`, and with the tokenizers of those.

    Raises CheckpointError when it has none of them, or when they do not fit the transformer.
    """
    supplied = [name for name in names if name in second.configs]
    if not supplied:
        raise CheckpointError(f"{second.origin} has no {', '.join(names)}; give {FORMS}")
    found = {**source.configs, **{name: second.configs[name] for name in supplied}}
    configs = {name: found[name] for name in COMPONENTS if name in found}
    _check_fit(source, second, configs)
    folders = tokenizers_of(supplied)
    index = {name: second.model_index.get(name, MODEL_INDEX[name]) for name in (*supplied, *folders)}
    return replace(
        source,
        origin=f"{source.origin} with {'VAE and ' if 'vae' in supplied else ''}text encoders of {second.origin}",
        configs=configs,
        open=lambda name: (second if name in supplied else source).open(name),
        tokenizers={
            **source.tokenizers,
            **{name: second.tokenizers[name] for name in folders if name in second.tokenizers},
        },
        model_index={**source.model_index, **index},
    )


def _check_fit(source: Source, second: Source, configs: dict[str, dict]) -> None:
    """Raise CheckpointError unless latents and encoders' states are as wide as the transformer takes them."""
    if "transformer" not in configs:
        return
    parsed = {name: parse_config(name, config) for name, config in configs.items()}
    transformer, problems = parsed["transformer"], []
    if "text_encoder" in parsed and "text_encoder_2" in parsed:
        pooled = parsed["text_encoder"].projection_dim + parsed["text_encoder_2"].projection_dim
        if pooled != transformer.pooled_projection_dim:
            problems.append(
                f"the CLIPs' pooled states are {pooled} wide together, the transformer of {source.origin} takes "
                f"{transformer.pooled_projection_dim}"
            )
    if "text_encoder_3" in parsed and parsed["text_encoder_3"].d_model != transformer.joint_attention_dim:
        problems.append(
            f"T5's states are {parsed['text_encoder_3'].d_model} wide, the transformer of {source.origin} takes "
            f"{transformer.joint_attention_dim}"
        )
    if "vae" in parsed and parsed["vae"].latent_channels != transformer.in_channels:
        problems.append(
            f"the VAE's latents have {parsed['vae'].latent_channels} channels, the transformer of {source.origin} "
            f"takes {transformer.in_channels}"
        )
    raise_all([f"{second.origin}: {problem}" for problem in problems], f"{second.origin} does not fit")
