"""Downloads from the Hugging Face Hub only the files that a job needs."""

from __future__ import annotations

import re
from collections.abc import Callable, Collection
from pathlib import Path
from typing import TypeVar

from seg4diff_jax.convert.components import COMPONENTS, tokenizers_of
from seg4diff_jax.convert.errors import CheckpointError
from seg4diff_jax.convert.files import read_json
from seg4diff_jax.convert.sources.diffusers_folder import SHARD, no_weights, weight_files, weight_map_of
from seg4diff_jax.convert.sources.index import check_index, named_components

TOKENIZER_REPOSITORY = "stabilityai/stable-diffusion-3-medium-diffusers"
WEIGHTS = ("model.safetensors", "pytorch_model.bin")
"""Weight files of transformers' models that are one file each; the first is preferred."""
Result = TypeVar("Result")


FILES = (".safetensors", ".gguf", ".ckpt", ".pt", ".pth", ".bin", ".json")


def is_repository_id(text: str) -> bool:
    """Whether a path that does not exist may be a Hub id.

    A path with a file's suffix, or whose first part is an existing directory, is none.
    """
    written = re.fullmatch(r"[\w.-]+/[\w.-]+", text) is not None and not text.startswith(".")
    return written and not text.endswith(FILES) and not Path(text.split("/")[0]).exists()


def fetch(repository: str, components: list[str], variant: str) -> Path:
    """Downloads the files that `components` need from a diffusers repository, and returns the folder.

    Without a network the files of an earlier download are used. Raises CheckpointError when there are none.
    """
    return _or_nothing_here(repository, lambda: _fetched(repository, components, variant))


def download_bytes(repository: str, components: list[str], variant: str) -> int:
    """Returns the size of the files that `fetch` downloads, those of an earlier download included.

    Raises CheckpointError if the repository cannot be reached.
    """
    import huggingface_hub

    ask = lambda: huggingface_hub.HfApi().model_info(repository, files_metadata=True)
    sizes = {file.rfilename: file.size or 0 for file in _answer_or_reason(repository, ask).siblings or []}
    return sum(sizes[file] for file in needed_files([*sizes], components, variant))


def fetch_model(repository: str, beside: Collection[str]) -> Path:
    """Downloads a model's configuration and weights from a repository of transformers, and returns the folder.

    Without a network the files of an earlier download are used. Raises CheckpointError when there are none.

    Args:
      beside: other files to download, if the repository has them.
    """
    return _or_nothing_here(repository, lambda: _fetched_model(repository, beside))


def _or_nothing_here(repository: str, request: Callable[[], Path]) -> Path:
    try:
        return request()
    except CheckpointError as error:
        raise CheckpointError(f"no file or directory {repository} here, and on the Hub {error}") from None


def _fetched_model(repository: str, beside: Collection[str]) -> Path:
    import huggingface_hub

    try:
        about = _answer_or_reason(repository, lambda: huggingface_hub.HfApi().model_info(repository))
    except CheckpointError as error:
        folder = _cached_folder(repository, error)
        _check_model(f"{error}; an earlier download", [path.name for path in folder.iterdir()])
        return folder
    files = [file.rfilename for file in about.siblings or []]
    wanted = ["config.json", _check_model(repository, files), *(name for name in beside if name in files)]
    return Path(
        _answer_or_reason(repository, lambda: huggingface_hub.snapshot_download(repository, allow_patterns=wanted))
    )


def _check_model(where: str, files: Collection[str]) -> str:
    """Returns a model's weight file. Raises CheckpointError if `files` lack it or the configuration."""
    weights = next((name for name in WEIGHTS if name in files), None)
    if weights is None or "config.json" not in files:
        raise CheckpointError(f"{where} lacks config.json, or {' or '.join(WEIGHTS)}: found no model of transformers")
    return weights


def _fetched(repository: str, components: list[str], variant: str) -> Path:
    import huggingface_hub

    try:
        # Without a network, listing files tries six times, for half a minute; `model_info` asks once.
        about = _answer_or_reason(repository, lambda: huggingface_hub.HfApi().model_info(repository))
    except CheckpointError as error:
        return _cached(repository, components, variant, error)
    files = [file.rfilename for file in about.siblings or []]
    if "model_index.json" not in files:
        raise CheckpointError(
            f"{repository} is not a diffusers repository (it has no model_index.json); give one that is, such as "
            f"{TOKENIZER_REPOSITORY}, or download its single safetensors or GGUF file and give its path"
        )
    for name in components:
        inside = _inside(name, files)
        if inside and not weight_files(inside, COMPONENTS[name].weights, variant):
            raise no_weights(f"{repository}/{name}", inside, COMPONENTS[name].weights)
    fetched = lambda names: Path(
        _answer_or_reason(repository, lambda: huggingface_hub.snapshot_download(repository, allow_patterns=names))
    )
    wanted = needed_files(files, components, variant)
    folder = fetched([file for file in wanted if not re.search(SHARD, file)])
    indices = [folder / file for file in wanted if ".index." in file]
    shards = {f"{index.parent.name}/{shard}" for index in indices for shard in weight_map_of(index).values()}
    return fetched(sorted(shards)) if shards else folder


def _cached(repository: str, components: list[str], variant: str, error: CheckpointError) -> Path:
    """Returns the folder of an earlier download that holds what `components` need.

    Raises `error` if there is no earlier download, and an error that also says what is absent if one is incomplete.
    """
    folder = _cached_folder(repository, error)
    lacking = ["model_index.json"]
    if (folder / "model_index.json").is_file():
        index = read_json(folder / "model_index.json")
        check_index(index, str(folder / "model_index.json"))
        named = [name for name in components if name in named_components(index)]
        lacking = [name for name in named if not _is_complete(folder / name, COMPONENTS[name].weights, variant)]
        lacking += [name for name in tokenizers_of(named) if not (folder / name).is_dir()]
    if lacking:
        raise CheckpointError(f"{error}; an earlier download is incomplete: it lacks {', '.join(lacking)}") from None
    return folder


def _cached_folder(repository: str, error: CheckpointError) -> Path:
    """Returns the folder of an earlier download. Raises `error` if there is none."""
    import huggingface_hub
    from huggingface_hub.errors import LocalEntryNotFoundError

    try:
        return Path(huggingface_hub.snapshot_download(repository, local_files_only=True))
    except LocalEntryNotFoundError:
        raise error from None


def _is_complete(folder: Path, weights: str, variant: str) -> bool:
    """Whether a component's configuration and weights are there. Absent shards are found later, when they are read."""
    files = [path.name for path in folder.iterdir()] if folder.is_dir() else []
    return "config.json" in files and bool(weight_files(files, weights, variant))


def fetch_tokenizers(components: list[str]) -> Path:
    """Downloads the published tokenizers and returns the folder. Raises CheckpointError when this fails."""
    import huggingface_hub

    names = tokenizers_of(components)
    folder = Path(
        _answer_or_reason(
            TOKENIZER_REPOSITORY,
            lambda: huggingface_hub.snapshot_download(
                TOKENIZER_REPOSITORY, allow_patterns=[f"{name}/*" for name in names]
            ),
        )
    )
    # Without a network the library returns whatever an earlier download left.
    if lacking := [name for name in names if not (folder / name).is_dir()]:
        raise CheckpointError(
            f"{TOKENIZER_REPOSITORY}: an earlier download lacks {', '.join(lacking)}; its licence is at "
            f"https://huggingface.co/{TOKENIZER_REPOSITORY}; connect, or give the path of a directory that holds them"
        )
    return folder


def needed_files(files: list[str], components: list[str], variant: str) -> list[str]:
    """Chooses a repository's index, scheduler, and each component's configuration, weights (one variant) and tokenizer.

    Of a component in shards only the shards with usual names are chosen; the index says which shards there are.
    """
    whole = {"scheduler", *tokenizers_of(components)}
    needed = [file for file in files if file == "model_index.json" or file.split("/")[0] in whole]
    for name in components:
        inside = _inside(name, files)
        weights = weight_files(inside, COMPONENTS[name].weights, variant)
        needed += [f"{name}/{file}" for file in inside & {"config.json", *weights}]
    return sorted(needed)


def _inside(folder: str, files: list[str]) -> set[str]:
    return {file.split("/")[1] for file in files if file.startswith(f"{folder}/") and file.count("/") == 1}


def _answer_or_reason(repository: str, request: Callable[[], Result]) -> Result:
    """Returns the request's result. Raises CheckpointError, which says in one sentence why there is none."""
    from huggingface_hub.errors import (
        GatedRepoError,
        HFValidationError,
        HTTPError,  # pyright: ignore[reportPrivateImportUsage]
        LocalEntryNotFoundError,
        RepositoryNotFoundError,
    )

    page = f"https://huggingface.co/{repository}"
    local = "or give the path of a directory that holds it"
    try:
        return request()
    except GatedRepoError:
        raise CheckpointError(
            f"{repository} is gated: accept its licence at {page} and run `hf auth login`, {local}"
        ) from None
    except RepositoryNotFoundError:
        raise CheckpointError(
            f"{repository} does not exist, or is private or gated and you are not logged in: check {page}, run "
            f"`hf auth login`, {local}"
        ) from None
    except HFValidationError as error:
        raise CheckpointError(f"{repository} is no repository's name ({str(error).splitlines()[0]})") from None
    except (ConnectionError, TimeoutError, LocalEntryNotFoundError, HTTPError) as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise CheckpointError(
            f"{repository} cannot be fetched: the Hub cannot be reached ({reason}); its licence is at {page}; connect, "
            f"{local}"
        ) from None
