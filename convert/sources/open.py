"""Opens a checkpoint: a diffusers directory, a single file, a converted directory or a Hub repository."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from importlib.resources import files
from pathlib import Path

from seg4diff_jax.convert.compatibility import check_fit
from seg4diff_jax.convert.components import COMPONENTS, tokenizers_of
from seg4diff_jax.convert.errors import CheckpointError, raise_all
from seg4diff_jax.convert.families import SD3
from seg4diff_jax.convert.files import read_json
from seg4diff_jax.convert.readers import Source
from seg4diff_jax.convert.sources import hub, native
from seg4diff_jax.convert.sources.container import SUFFIXES
from seg4diff_jax.convert.sources.diffusers_folder import component_in, open_component_folder, open_diffusers
from seg4diff_jax.convert.sources.single_file import open_single_file
from seg4diff_jax.convert.sources.text_encoders import (
    completed,
    encoder_of_file,
    holds_files,
    missing,
    open_file,
    open_files,
    remedy,
)
from seg4diff_jax.convert.staging import is_leftover

T5 = SD3.t5
MINIATURE = Path(str(files("seg4diff_jax.miniature"))) / "checkpoint"
"""The directory that "miniature" stands for: the small SD3 that comes with this package."""
MARKERS = (native.MANIFEST, "model_index.json")
FORMS = (
    f"a directory with {native.MANIFEST} (as `seg4diff convert checkpoint` writes it) or with model_index.json (as "
    "diffusers does), the folder of a transformer alone, a single .safetensors file (or .gguf) with a transformer in "
    "it, or the Hub id of a diffusers repository"
)


class NothingLacks(CheckpointError):
    """A second source was given for text encoders, but the first source has all of them."""


def open_source(
    source: str | Path,
    *,
    components: Sequence[str] | None = None,
    tokenizers: Path | None = None,
    variant: str | None = None,
    text_encoders: str | Path | None = None,
) -> Source:
    """Opens a checkpoint for reading.

    Args:
      source: a directory that `seg4diff convert checkpoint` wrote, a diffusers directory, a single safetensors or GGUF
        file with a transformer in it, a Hub id `organisation/name` of a diffusers repository, or "miniature".
      components: the components that will be read; nothing else is fetched. Default: all there is; from the Hub all but
        `text_encoder_3`, whose T5-XXL is two thirds of the bytes.
      tokenizers: a directory with folders `tokenizer`, `tokenizer_2` and, for T5, `tokenizer_3`; needed for single
        files, which hold none.
      variant: variant of the weight files, as in `fp16`. Default: the plain files, or else the only variant there is;
        from the Hub `fp16` if there is one. There "" asks for the plain files.
      text_encoders: a second source, for the text encoders, tokenizers and VAE that the first source lacks. It has any
        of the forms of `source`, or is a directory with Stability's `clip_l.safetensors`, `clip_g.safetensors` [,
        `t5xxl_fp16.safetensors`, or T5's encoder as GGUF], or is one of those files.

    Raises CheckpointError, which says what was expected, what was found and what to do. Raises NothingLacks, a kind of
    CheckpointError, when `text_encoders` would go unused.
    """
    unknown = [name for name in components or () if name not in COMPONENTS]
    if unknown:
        raise CheckpointError(f"no component is called {', '.join(unknown)}; there are {', '.join(COMPONENTS)}")
    opened = _open(source, components, variant)
    wanted = None if components is None else list(components)
    absent = missing(opened, wanted)
    if text_encoders is not None and not absent:
        raise NothingLacks(
            f"{source} has all the text encoders that are wanted: leave out text_encoders= (--text-encoders), which "
            "would go unused"
        )
    if text_encoders is not None:
        opened = completed(opened, _open_text_encoders(text_encoders, absent, wanted is None, variant), absent)
    if wanted is not None:
        _check_complete(source, opened, wanted)
        opened = _only(opened, wanted)
    if text_encoders is None:
        check_fit(opened.configs, dict.fromkeys(opened.configs, opened.origin))
    if tokenizers is not None:
        opened = _with_tokenizers(opened, tokenizers)
    return opened


def _open(source: str | Path, components: Sequence[str] | None, variant: str | None) -> Source:
    """Opens a source. A local one may hold more than `components`; from the Hub nothing else is fetched."""
    path = Path(source).expanduser()
    if str(source) == "miniature":
        path = MINIATURE
        if not path.is_dir():
            raise CheckpointError(
                f"{path} is not there: this copy of the package lacks the miniature's weights. Install it again, or "
                "train them as docs/miniature.md says and give runs/miniature/flow_matching/export"
            )
    _check_form(path)
    if (path / native.MANIFEST).is_file():
        return native.open_native(path)
    if path.is_dir():
        alone = not _is_marked(path)
        return open_component_folder(path, variant) if alone else open_diffusers(path, variant, components=components)
    if path.is_file():
        return open_single_file(path)
    if not hub.is_repository_id(str(source)):
        raise CheckpointError(
            f"{source}: no such file or directory, and not a Hub id like organisation/name; give miniature, {FORMS}"
        )
    fetched = [name for name in COMPONENTS if (name in components if components is not None else name != T5)]
    wanted = "fp16" if variant is None else variant
    opened = open_diffusers(hub.fetch(str(source), fetched, wanted), wanted, str(source))
    return _only(opened, [name for name in fetched if name in opened.configs])


def _open_text_encoders(source: str | Path, names: list[str], everything: bool, variant: str | None) -> Source:
    """Opens a second source. `everything` means that the user chose no components; then T5 is not downloaded."""
    path = Path(source).expanduser()
    if path.is_dir() and not _is_marked(path) and holds_files(path):
        return open_files(path, names, variant)
    if path.is_file() and encoder_of_file(path) is not None:
        return open_file(path)
    return _open(source, [name for name in names if not everything or name != T5], variant)


def _check_complete(source: str | Path, opened: Source, wanted: list[str]) -> None:
    absent = missing(opened, wanted)
    problems = [f"{source} has no {name}" for name in wanted if name not in opened.configs and name not in absent]
    if absent:
        problems.append(f"{source} has no {', '.join(absent)}. {remedy(source)}")
    raise_all(problems, str(source))


def _check_form(path: Path) -> None:
    """Raises CheckpointError, which says what to give instead, for a path that is no checkpoint, or a part of one."""
    if is_leftover(path):
        raise CheckpointError(f"{path} was left by an interrupted conversion; convert the original again")
    above = path.absolute().parent
    if path.is_file() and (path.suffix == ".json" or above.name in COMPONENTS):
        # A single file may lie beside model_index.json, as in the repositories of SD3.5.
        if whole := next((folder for folder in (above, above.parent) if _is_marked(folder)), None):
            raise CheckpointError(f"{path} is one file of a checkpoint: give the directory that holds it all, {whole}")
        if path.suffix == ".json":
            raise CheckpointError(f"{path} is no checkpoint; give {FORMS}")
    if path.is_dir() and not _is_marked(path):
        if _is_marked(above) and (path.name in COMPONENTS or component_in(path) is None):
            raise CheckpointError(f"{path} is one folder of a checkpoint: give the directory above it, {above}")
        if component_in(path) is None:
            raise CheckpointError(f"{path} has neither {' nor '.join(MARKERS)}{_candidates(path)}; give {FORMS}")


def _is_marked(directory: Path) -> bool:
    return any((directory / marker).is_file() for marker in MARKERS)


def _candidates(directory: Path) -> str:
    """Returns a hint, in parentheses, at what in a directory may be a checkpoint or part of one; "" without any."""
    if kind := _class_in(directory):
        return f" (it is the folder of a {kind})"
    parts = [name for name in COMPONENTS if any((directory / name).glob("*.safetensors"))]
    if len(parts) == 1 and component_in(directory / parts[0]):
        return f" (a {parts[0]} alone is in {directory / parts[0]}: is that meant?)"
    if parts:
        return f" (its {', '.join(parts)} belong to one in diffusers' layout: fetch its model_index.json too)"
    found = [path.name for path in sorted(directory.iterdir()) if path.suffix.lower() in SUFFIXES or _is_marked(path)]
    return f" (it holds {', '.join(found)}: is one of these meant?)" if found else ""


def _class_in(folder: Path) -> str | None:
    """Returns the diffusers class that a folder's configuration names, or None."""
    kind = read_json(folder / "config.json").get("_class_name") if (folder / "config.json").is_file() else None
    return kind if isinstance(kind, str) else None


def _only(source: Source, components: Sequence[str]) -> Source:
    names = [name for name in COMPONENTS if name in components]
    folders = tokenizers_of(names)
    return replace(
        source,
        configs={name: source.configs[name] for name in names},
        tokenizers={name: path for name, path in source.tokenizers.items() if name in folders},
        recorded_expert=source.recorded_expert if "transformer" in names else None,
    )


def with_published_tokenizers(source: Source) -> Source:
    """Returns the source with all tokenizers that its text encoders need: those that it lacks are SD3's from the Hub.

    Raises CheckpointError when tokenizers are absent and cannot be fetched.
    """
    missing = [name for name in tokenizers_of(list(source.configs)) if name not in source.tokenizers]
    if not missing:
        return source
    try:
        folder = hub.fetch_tokenizers(list(source.configs))
    except CheckpointError as error:
        raise CheckpointError(
            f"{source.origin} comes without {', '.join(missing)}: name a directory that holds these folders "
            f"(tokenizers=DIR, --tokenizers DIR). Those published were tried: {error}"
        ) from None
    return replace(source, tokenizers={**{name: folder / name for name in missing}, **source.tokenizers})


def _with_tokenizers(source: Source, directory: Path) -> Source:
    folders = tokenizers_of(list(source.configs))
    raise_all(
        [f"{directory} has no folder {name}" for name in folders if not (directory / name).is_dir()], str(directory)
    )
    source.tokenizers.update({name: directory / name for name in folders})
    return source
