"""Where a checkpoint comes from: a diffusers directory, a single file, a converted directory or a Hub repository."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from convert import hub, native
from convert.components import COMPONENTS, tokenizers_of
from convert.diffusers_folder import open_diffusers
from convert.errors import CheckpointError, raise_all
from convert.readers import Source
from convert.single_file import open_single_file
from convert.staging import is_leftover

MARKERS = (native.MANIFEST, "model_index.json")
FORMS = (
    f"a directory with {native.MANIFEST} (as `python -m convert checkpoint` writes it) or with model_index.json (as "
    "diffusers does), a single .safetensors file with a transformer in it, or the Hub id of a diffusers repository"
)


def open_source(
    source: str | Path,
    *,
    components: Sequence[str] | None = None,
    tokenizers: Path | None = None,
    variant: str | None = None,
) -> Source:
    """Open a checkpoint for reading.

    Args:
      source: a directory that `python -m convert checkpoint` wrote, a diffusers directory, a single safetensors file
        as Stability publishes them, or a Hub id `organisation/name` of a diffusers repository.
      components: what will be read, so that nothing else is fetched. Default: all there is; from the Hub all but
        `text_encoder_3`, whose T5-XXL is two thirds of the bytes.
      tokenizers: a directory with folders `tokenizer`, `tokenizer_2` and, for T5, `tokenizer_3`; needed for single
        files, which hold none.
      variant: of the weight files, as in `fp16`; default: the plain files, or else the only variant there is; from
        the Hub `fp16` where there is one.

    Raises CheckpointError with what was expected, what was found and what to do.
    """
    unknown = [name for name in components or () if name not in COMPONENTS]
    if unknown:
        raise CheckpointError(f"no component is called {', '.join(unknown)}; there are {', '.join(COMPONENTS)}")
    path = Path(source).expanduser()
    _check_form(path)
    if (path / native.MANIFEST).is_file():
        opened = native.open_native(path)
    elif path.is_dir():
        opened = open_diffusers(path, variant)
    elif path.is_file():
        opened = open_single_file(path)
    elif hub.is_repository_id(str(source)):
        wanted = list(components or [name for name in COMPONENTS if name != "text_encoder_3"])
        opened = open_diffusers(hub.fetch(str(source), wanted, variant or "fp16"), variant or "fp16", str(source))
        components = components or [name for name in wanted if name in opened.configs]
    else:
        raise CheckpointError(
            f"{source}: no such file or directory, and not a Hub id like organisation/name; give {FORMS}"
        )
    if components is not None:
        raise_all([f"{source} has no {name}" for name in components if name not in opened.configs], str(source))
        opened = _only(opened, components)
    if tokenizers is not None:
        opened = _with_tokenizers(opened, tokenizers)
    return opened


def _check_form(path: Path) -> None:
    """Raise CheckpointError, naming what to give instead, for what is plainly beside or inside a checkpoint."""
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
        if _is_marked(above):
            raise CheckpointError(f"{path} is one folder of a checkpoint: give the directory above it, {above}")
        raise CheckpointError(f"{path} has neither {' nor '.join(MARKERS)}{_candidates(path)}; give {FORMS}")


def _is_marked(directory: Path) -> bool:
    return any((directory / marker).is_file() for marker in MARKERS)


def _candidates(directory: Path) -> str:
    """What a directory that is no checkpoint holds that may be one."""
    found = [path.name for path in sorted(directory.iterdir()) if path.suffix == ".safetensors" or _is_marked(path)]
    return f" (it holds {', '.join(found)}: is one of these meant?)" if found else ""


def _only(source: Source, components: Sequence[str]) -> Source:
    names = [name for name in COMPONENTS if name in components]
    folders = tokenizers_of(names)
    return Source(
        source.origin,
        {name: source.configs[name] for name in names},
        source.open,
        {name: path for name, path in source.tokenizers.items() if name in folders},
        source.scheduler,
        source.model_index,
    )


def _with_tokenizers(source: Source, directory: Path) -> Source:
    folders = tokenizers_of(list(source.configs))
    raise_all(
        [f"{directory} has no folder {name}" for name in folders if not (directory / name).is_dir()], str(directory)
    )
    source.tokenizers.update({name: directory / name for name in folders})
    return source
