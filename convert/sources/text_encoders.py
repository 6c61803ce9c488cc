"""Opens text encoders and a VAE from a second source.

Most single files hold a transformer and a VAE, or a transformer alone.
"""

from __future__ import annotations

import re
from collections.abc import Collection
from dataclasses import replace
from pathlib import Path

from seg4diff_jax.convert.compatibility import check_fit
from seg4diff_jax.convert.components import COMPONENTS, tokenizers_of
from seg4diff_jax.convert.errors import CheckpointError
from seg4diff_jax.convert.readers import Source
from seg4diff_jax.convert.sources.container import SUFFIXES
from seg4diff_jax.convert.sources.single_file import of_tensors
from seg4diff_jax.convert.sources.stored_tensor import StoredTensor
from seg4diff_jax.convert.sources.weight_files import read_weights

FILES = {name: component.file for name, component in COMPONENTS.items() if component.file}
"""Name of a component's own file without `_fp16` and the suffix; for text encoders it is Stability's name."""
FORMS = (
    "a diffusers directory, a converted directory, a single file that has text encoders, or a directory with "
    "clip_l.safetensors, clip_g.safetensors [, t5xxl_fp16.safetensors, or T5's encoder as GGUF] [and vae.safetensors]"
)


def remedy(source: str | Path) -> str:
    """Returns what to do about a checkpoint that lacks text encoders."""
    return (
        "Stability's sd3_medium.safetensors and sd3.5_*.safetensors come without text encoders, files of a transformer "
        "alone, such as GGUF, without a VAE too. Give them as "
        "text_encoders=DIR (--text-encoders DIR in commands), or convert once with `seg4diff convert checkpoint "
        f"{source} DST --text-encoders DIR`; DIR is {FORMS}"
    )


def holds_files(directory: Path) -> bool:
    """Whether components lie under `directory` in files of their own, as in Stability's `text_encoders`."""
    return any(_files(folder, name) for name in FILES for folder in _folders(directory, name))


def open_files(directory: Path, names: Collection[str], variant: str | None) -> Source:
    """Opens those of the components `names` that lie in separate files.

    The tensors' names may be those of a single file, with its prefix or without, those of diffusers, or those of GGUF.
    """
    found = {}
    for name in names:
        folder = next((each for each in _folders(directory, name) if _files(each, name)), None)
        if folder is not None:
            found[name] = _alone(name, _choose(folder, name, variant))
    return of_tensors(str(directory), found)


def _folders(directory: Path, name: str) -> tuple[Path, ...]:
    """Returns the folders where a component's file may lie.

    ComfyUI has `models/vae` and `models/text_encoders`, formerly `models/clip`.
    """
    return (directory, *(directory / below for below in (("vae",) if name == "vae" else ("text_encoders", "clip"))))


def encoder_of_file(path: Path) -> str | None:
    """Returns the text encoder, or the VAE, that a file holds, by the file's name; None for another file."""
    return next((name for name in FILES if _variant(path.name, name) is not None), None)


def open_file(path: Path) -> Source:
    """Opens one text encoder, or the VAE, in a file of its own."""
    name = str(encoder_of_file(path))
    return of_tensors(str(path), {name: _alone(name, path)})


def _alone(name: str, path: Path) -> tuple[Path, str, dict[str, StoredTensor]]:
    """Returns a component's own file, the prefix of the tensors' names in it, and the tensors without that prefix."""
    tensors, prefix = read_weights(path), COMPONENTS[name].prefix
    if not all(key.startswith(prefix) for key in tensors):
        return path, "", tensors
    return path, prefix, {key.removeprefix(prefix): tensor for key, tensor in tensors.items()}


def _variant(file: str, name: str) -> str | None:
    """Returns the variant in the name of a component's file, as in `fp16`; "" without one, None for another file."""
    suffixes = "|".join(map(re.escape, SUFFIXES))
    found = re.fullmatch(
        rf"(?:{COMPONENTS[name].file_pattern})(?:[-_.](?P<variant>.+))?(?:{suffixes})", file, re.IGNORECASE
    )
    return None if found is None else found["variant"] or ""


def _files(folder: Path, name: str) -> dict[str, list[Path]]:
    """Returns the files in which a component lies, by variant."""
    found: dict[str, list[Path]] = {}
    for path in sorted(folder.iterdir()) if folder.is_dir() else ():
        if (variant := _variant(path.name, name)) is not None:
            found.setdefault(variant, []).append(path)
    return found


def _choose(folder: Path, name: str, variant: str | None) -> Path:
    """Chooses a file such as `t5xxl_fp16` or `t5xxl_fp8_e4m3fn`: the variant's, the plain, the only or the fp16 one."""
    found = _files(folder, name)
    for choice in (variant, "", *(found if len(found) == 1 else ()), "fp16"):
        if len(paths := found.get(choice or "", [])) == 1:
            return paths[0]
    files = ", ".join(sorted(path.name for each in found.values() for path in each))
    how = f"name what follows {FILES[name]}_ with --variant" if len(found) > 1 else "leave one of them in the directory"
    raise CheckpointError(f"{folder}: which of {files}? To choose, {how}")


def missing(source: Source, wanted: list[str] | None) -> list[str]:
    """Returns the names of the VAE and text encoders that a checkpoint lacks, of those wanted (default: all)."""
    return [name for name in FILES if name not in source.configs and (wanted is None or name in wanted)]


def completed(source: Source, second: Source, names: list[str]) -> Source:
    """Returns `source` with those of the components `names` that `second` has, and with the tokenizers of those.

    Raises CheckpointError when `second` has none of them, or when they do not fit the transformer.
    """
    supplied = [name for name in names if name in second.configs]
    if not supplied:
        raise CheckpointError(f"{second.origin} has no {', '.join(names)}; give {FORMS}")
    found = {**source.configs, **{name: second.configs[name] for name in supplied}}
    configs = {name: found[name] for name in COMPONENTS if name in found}
    check_fit(configs, {name: second.origin if name in supplied else source.origin for name in configs})
    folders = tokenizers_of(supplied)
    index = {name: second.model_index.get(name, second.family.model_index[name]) for name in (*supplied, *folders)}
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
