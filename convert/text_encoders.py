"""Text encoders from elsewhere: most of Stability's single files hold a transformer and a VAE alone."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from convert.components import COMPONENTS, parse_config, tokenizers_of
from convert.errors import CheckpointError, raise_all
from convert.readers import MODEL_INDEX, Source, TorchComponent
from convert.safetensors_stream import read_header
from convert.single_file import infer_config

FILES = {"text_encoder": "clip_l", "text_encoder_2": "clip_g", "text_encoder_3": "t5xxl"}
"""What Stability calls a text encoder's own file, without what follows (`_fp16`) and the suffix."""
FORMS = (
    "a diffusers directory, a converted directory, a single file that has text encoders, or a directory with "
    "clip_l.safetensors, clip_g.safetensors [and t5xxl_fp16.safetensors]"
)


def remedy(source: str | Path) -> str:
    """What to do about a checkpoint that lacks text encoders."""
    return (
        "Stability's sd3_medium.safetensors and sd3.5_*.safetensors come without text encoders. Give them as "
        "text_encoders=DIR (--text-encoders DIR in commands), or convert once with `python -m convert checkpoint "
        f"{source} DST --text-encoders DIR`; DIR is {FORMS}"
    )


def folder_of_files(directory: Path) -> Path | None:
    """Where under `directory` each text encoder lies in a file of its own, as in Stability's `text_encoders`."""
    folders = (directory, directory / "text_encoders")
    return next((each for each in folders if any(_files(each, stem) for stem in FILES.values())), None)


def open_files(folder: Path, variant: str | None) -> Source:
    """Text encoders in separate files. Their tensors are named as in a single file, without the prefix."""
    paths = {name: path for name, stem in FILES.items() if (path := _choose(folder, stem, variant)) is not None}
    tensors = {name: read_header(path) for name, path in paths.items()}
    configs = {
        name: infer_config(name, {key: info.shape for key, info in found.items()}) for name, found in tensors.items()
    }
    return Source(
        str(folder),
        configs,
        lambda name: TorchComponent(name, configs[name], "stability", tensors[name], str(paths[name])),
    )


def _files(folder: Path, stem: str) -> list[Path]:
    return sorted([*folder.glob(f"{stem}.safetensors"), *folder.glob(f"{stem}_*.safetensors")])


def _choose(folder: Path, stem: str, variant: str | None) -> Path | None:
    """Of `t5xxl_fp16`, `t5xxl_fp8_e4m3fn` ... the one of the variant, the plain or only one, or the fp16 one."""
    found = {path.stem: path for path in _files(folder, stem)}
    for name in (f"{stem}_{variant}", stem, *(found if len(found) == 1 else ()), f"{stem}_fp16"):
        if name in found:
            return found[name]
    if found:
        raise CheckpointError(
            f"{folder}: which of {', '.join(sorted(found))}? Name what follows {stem}_ with --variant"
        )
    return None


def missing(source: Source, wanted: list[str] | None) -> list[str]:
    """The text encoders that a checkpoint lacks, of those wanted (default: all)."""
    return [name for name in FILES if name not in source.configs and (wanted is None or name in wanted)]


def completed(source: Source, second: Source, names: list[str]) -> Source:
    """`source` with what `second` has of the text encoders `names`, and with their tokenizers.

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
        origin=f"{source.origin} with text encoders of {second.origin}",
        configs=configs,
        open=lambda name: (second if name in supplied else source).open(name),
        tokenizers={
            **source.tokenizers,
            **{name: second.tokenizers[name] for name in folders if name in second.tokenizers},
        },
        model_index={**source.model_index, **index},
    )


def _check_fit(source: Source, second: Source, configs: dict[str, dict]) -> None:
    """Raise CheckpointError unless the encoders' widths are those that the transformer takes."""
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
    raise_all([f"{second.origin}: {problem}" for problem in problems], f"{second.origin} does not fit")
