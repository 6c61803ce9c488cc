"""Text encoders, and a VAE, from elsewhere: most single files hold a transformer and a VAE, or a transformer alone."""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path

from convert.components import COMPONENTS, tokenizers_of
from convert.container import SUFFIXES
from convert.errors import CheckpointError
from convert.fit import check_fit
from convert.readers import MODEL_INDEX, Source
from convert.single_file import of_tensors
from convert.stored import StoredTensor
from convert.weight_files import read_weights

FILES = {"vae": "vae", "text_encoder": "clip_l", "text_encoder_2": "clip_g", "text_encoder_3": "t5xxl"}
"""What a component's own file is called, a text encoder's as Stability does, without `_fp16` and the suffix."""
STEMS = {**FILES, "vae": r"(?:sd3(?:\.5)?[-_])?vae", "text_encoder_3": r"t5xxl|t5-v1_1-xxl-encoder"}
"""The same as patterns, with what T5's encoder is called as GGUF."""
FORMS = (
    "a diffusers directory, a converted directory, a single file that has text encoders, or a directory with "
    "clip_l.safetensors, clip_g.safetensors [, t5xxl_fp16.safetensors, or T5's encoder as GGUF] [and vae.safetensors]"
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
    """Where under `directory` each component lies in a file of its own, as in Stability's `text_encoders`."""
    folders = (directory, directory / "text_encoders")
    return next((each for each in folders if any(_files(each, name) for name in FILES)), None)


def open_files(folder: Path, variant: str | None) -> Source:
    """Text encoders and VAE in separate files.

    Their tensors are named as in a single file, with its prefix or without, as diffusers does, or as in GGUF.
    """
    paths = {name: path for name in FILES if (path := _choose(folder, name, variant)) is not None}
    return of_tensors(str(folder), {name: _alone(name, path) for name, path in paths.items()})


def encoder_of_file(path: Path) -> str | None:
    """The text encoder, or VAE, whose file this is, by its name."""
    return next((name for name in FILES if _variant(path.name, name) is not None), None)


def open_file(path: Path) -> Source:
    """One text encoder, or VAE, in a file of its own."""
    name = str(encoder_of_file(path))
    return of_tensors(str(path), {name: _alone(name, path)})


def _alone(name: str, path: Path) -> tuple[Path, str, dict[str, StoredTensor]]:
    """A component's own file, what stands before its tensors' names in it, and its tensors without that."""
    tensors, prefix = read_weights(path), COMPONENTS[name].prefix
    if not all(key.startswith(prefix) for key in tensors):
        return path, "", tensors
    return path, prefix, {key.removeprefix(prefix): tensor for key, tensor in tensors.items()}


def _variant(file: str, name: str) -> str | None:
    """What follows the name of a component's file, as in `fp16`; "" for nothing, None for another file."""
    suffixes = "|".join(map(re.escape, SUFFIXES))
    found = re.fullmatch(rf"(?:{STEMS[name]})(?:[-_.](?P<variant>.+))?(?:{suffixes})", file)
    return None if found is None else found["variant"] or ""


def _files(folder: Path, name: str) -> dict[str, list[Path]]:
    """By variant, the files in which a component lies."""
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
    return [name for name in FILES if name not in source.configs and (wanted is None or name in wanted)]


def completed(source: Source, second: Source, names: list[str]) -> Source:
    """`source` with what `second` has of the components `names`, and with the tokenizers of those.

    Raises CheckpointError when it has none of them, or when they do not fit the transformer.
    """
    supplied = [name for name in names if name in second.configs]
    if not supplied:
        raise CheckpointError(f"{second.origin} has no {', '.join(names)}; give {FORMS}")
    found = {**source.configs, **{name: second.configs[name] for name in supplied}}
    configs = {name: found[name] for name in COMPONENTS if name in found}
    check_fit(configs, {name: second.origin if name in supplied else source.origin for name in configs})
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
