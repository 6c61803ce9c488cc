"""From the Hub only what is needed is fetched, and what cannot be fetched is explained in one sentence."""

from __future__ import annotations

import json
import re
import shutil
from fnmatch import fnmatch
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import huggingface_hub
import pytest
from huggingface_hub.errors import (
    GatedRepoError,
    HfHubHTTPError,
    HFValidationError,
    LocalEntryNotFoundError,
    OfflineModeIsEnabled,
    RepositoryNotFoundError,
)
from safetensors.torch import load_file, save_file

from seg4diff_jax.analysis.clip import load_clip
from seg4diff_jax.analysis.dino import load_dino
from seg4diff_jax.convert.checkpoint import convert_checkpoint
from seg4diff_jax.convert.components import COMPONENTS
from seg4diff_jax.convert.errors import CheckpointError
from seg4diff_jax.convert.sources import hub
from seg4diff_jax.convert.sources.open import open_source
from seg4diff_jax.convert.sources.transformers_folder import find_folder
from tests.reference.checkpoints import make_checkpoint
from tests.reference.scorers import save_scorers

REPOSITORY = "stabilityai/stable-diffusion-3-medium-diffusers"
WITHOUT_T5 = ["transformer", "vae", "text_encoder", "text_encoder_2"]
PUBLISHED = """
.gitattributes LICENSE.md README.md model_index.json scheduler/scheduler_config.json text_encoder/config.json
text_encoder/model.fp16.safetensors text_encoder/model.safetensors text_encoder_2/config.json
text_encoder_2/model.fp16.safetensors text_encoder_2/model.safetensors text_encoder_3/config.json
text_encoder_3/model-00001-of-00002.safetensors text_encoder_3/model-00002-of-00002.safetensors
text_encoder_3/model.fp16-00001-of-00002.safetensors text_encoder_3/model.fp16-00002-of-00002.safetensors
text_encoder_3/model.safetensors.index.fp16.json text_encoder_3/model.safetensors.index.json
tokenizer/merges.txt tokenizer/special_tokens_map.json tokenizer/tokenizer_config.json tokenizer/vocab.json
tokenizer_2/merges.txt tokenizer_2/special_tokens_map.json tokenizer_2/tokenizer_config.json tokenizer_2/vocab.json
tokenizer_3/special_tokens_map.json tokenizer_3/spiece.model tokenizer_3/tokenizer.json
tokenizer_3/tokenizer_config.json transformer/config.json transformer/diffusion_pytorch_model.safetensors
vae/config.json vae/diffusion_pytorch_model.safetensors
""".split()  # noqa: SIM905


class Response:
    """Just enough of an HTTP response for the library's errors."""

    headers: dict[str, str] = {}  # noqa: RUF012
    request = None
    status_code = 401


def http_error(kind: type[HfHubHTTPError]) -> HfHubHTTPError:
    return kind("401 Client Error.\nAccess to the model is restricted.", response=Response())  # pyright: ignore


class FakeHub:
    """A repository on this disk. `error`: what every request raises instead."""

    def __init__(self, folder: Path | None, files: list[str], error: Exception | None = None):
        self.folder, self.files, self.error = folder, files, error
        self.fetched: list[str] = []

    def model_info(self, repository: str, files_metadata: bool = False) -> SimpleNamespace:
        if self.error is not None:
            raise self.error
        size = lambda file: (self.folder / file).stat().st_size if files_metadata and self.folder else None
        return SimpleNamespace(siblings=[SimpleNamespace(rfilename=file, size=size(file)) for file in self.files])

    def snapshot_download(self, repository: str, *, allow_patterns: Any = None, local_files_only: bool = False) -> str:
        if local_files_only and self.folder is None:
            raise LocalEntryNotFoundError("not in the cache")
        if self.error is not None and not local_files_only:
            raise self.error
        self.fetched += [file for file in self.files if any(fnmatch(file, p) for p in allow_patterns or ["*"])]
        return str(self.folder)


@pytest.fixture
def serve(monkeypatch: pytest.MonkeyPatch):
    def install(fake: FakeHub) -> FakeHub:
        monkeypatch.setattr(huggingface_hub, "HfApi", lambda: fake)
        monkeypatch.setattr(huggingface_hub, "snapshot_download", fake.snapshot_download)
        return fake

    return install


def test_of_a_published_repository_one_variant_and_no_t5_is_needed():
    needed = hub.needed_files(PUBLISHED, WITHOUT_T5, "fp16")
    assert needed == sorted(
        file
        for file in PUBLISHED
        if file == "model_index.json"
        or file.startswith(("scheduler/", "tokenizer/", "tokenizer_2/", "transformer/", "vae/"))
        or (file.startswith(("text_encoder/", "text_encoder_2/")) and ("fp16" in file or "config" in file))
    )


def test_t5_comes_when_asked_for_with_all_shards_of_one_variant():
    for variant, mark in (("fp16", True), ("fp32", False)):
        needed = hub.needed_files(PUBLISHED, ["text_encoder_3"], variant)
        weights = [file for file in needed if file.startswith("text_encoder_3/model")]
        assert len(weights) == 3
        assert all(("fp16" in file) == mark for file in weights)
        assert "tokenizer_3/spiece.model" in needed
        assert not any(file.startswith(("vae/", "transformer/", "tokenizer/")) for file in needed)


def test_a_single_component_fetches_nothing_else(serve, tmp_path: Path):
    folder = make_checkpoint(tmp_path / "sd3")
    fake = serve(FakeHub(folder, [str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()]))
    open_source(REPOSITORY, components=["vae"]).component("vae").check()
    assert set(fake.fetched) == {
        "model_index.json",
        "scheduler/scheduler_config.json",
        "vae/config.json",
        "vae/diffusion_pytorch_model.safetensors",
    }


def test_what_will_be_downloaded_is_the_size_of_what_is(serve, tmp_path: Path):
    folder = make_checkpoint(tmp_path / "sd3")
    fake = serve(FakeHub(folder, [str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()]))
    said = hub.download_bytes(REPOSITORY, WITHOUT_T5, "fp16")
    open_source(REPOSITORY, components=WITHOUT_T5)
    assert said == sum((folder / file).stat().st_size for file in {*fake.fetched})


def test_from_the_hub_weights_are_fp16_or_the_plain_ones_on_request(serve, tmp_path: Path):
    folder = make_checkpoint(tmp_path / "sd3", t5=False)
    half = folder / "text_encoder" / "model.fp16.safetensors"
    weights = load_file(folder / "text_encoder" / "model.safetensors")
    save_file({name: tensor.half() for name, tensor in weights.items()}, half)
    save_file({name: tensor.float() for name, tensor in weights.items()}, half.with_name("model.safetensors"))
    fake = serve(FakeHub(folder, [str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()]))
    for variant, file, dtype in ((None, half.name, "float16"), ("", "model.safetensors", "float32")):
        fake.fetched.clear()
        component = open_source(REPOSITORY, components=["text_encoder"], variant=variant).component("text_encoder")
        assert {str(found) for _, found in component.layout().values()} == {dtype}
        assert [name for name in fake.fetched if "model." in name] == [f"text_encoder/{file}"]


def test_shards_are_those_that_the_index_names_whatever_they_are_called(serve, tmp_path: Path):
    folder = make_checkpoint(tmp_path / "sd3", max_shard_size="50KB") / "transformer"
    index = folder / "diffusion_pytorch_model.safetensors.index.json"
    contents = json.loads(index.read_text())
    first = sorted(set(contents["weight_map"].values()))[0]
    (folder / first).rename(folder / "first.safetensors")
    shutil.copy(folder / "first.safetensors", folder / "diffusion_pytorch_model-00001-of-00077.safetensors")
    named = {name: "first.safetensors" if file == first else file for name, file in contents["weight_map"].items()}
    index.write_text(json.dumps(contents | {"weight_map": named}))
    files = [str(path.relative_to(folder.parent)) for path in folder.parent.rglob("*") if path.is_file()]
    fake = serve(FakeHub(folder.parent, files))
    open_source(REPOSITORY, components=["transformer"]).component("transformer").check()
    fetched = {Path(name).name for name in fake.fetched if name.startswith("transformer/")}
    assert fetched == {"config.json", index.name, *named.values()}


@pytest.mark.parametrize(
    ("files", "message"),
    [
        (["bf16", "fp32"], "vae: weights of variants bf16 and fp32, and no plain ones: choose by --variant"),
        (["bin"], r"vae: diffusion_pytorch_model\.bin: pickled weights can run code"),
    ],
)
def test_what_cannot_be_chosen_is_said_as_of_a_directory(serve, tmp_path: Path, files: list[str], message: str):
    folder = make_checkpoint(tmp_path / "sd3", t5=False)
    weights = folder / "vae" / "diffusion_pytorch_model.safetensors"
    for kind in files:
        shutil.copy(weights, weights.with_suffix(".bin" if kind == "bin" else f".{kind}.safetensors"))
    weights.unlink()
    serve(FakeHub(folder, [str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()]))
    for source in (REPOSITORY, folder):
        with pytest.raises(CheckpointError, match=message):
            open_source(source, components=["vae"]).component("vae")


def test_a_repository_converts_without_t5_unless_asked(serve, tmp_path: Path):
    folder = make_checkpoint(tmp_path / "sd3")
    fake = serve(FakeHub(folder, [str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()]))
    convert_checkpoint(REPOSITORY, tmp_path / "native")
    manifest = json.loads((tmp_path / "native" / "manifest.json").read_text())
    assert list(manifest["components"]) == WITHOUT_T5
    assert manifest["source"] == REPOSITORY
    assert not any("_3/" in file for file in fake.fetched)
    assert list(open_source(REPOSITORY, components=list(COMPONENTS)).configs) == list(COMPONENTS)


@pytest.mark.parametrize(
    ("error", "message"),
    [
        (http_error(GatedRepoError), "is gated: accept its licence"),
        (http_error(RepositoryNotFoundError), "does not exist, or is private or gated"),
        (HFValidationError("Repo id must not end by -"), "is no repository's name .Repo id must"),
        (http_error(HfHubHTTPError), "cannot be reached"),
        (OfflineModeIsEnabled("offline mode is enabled"), "cannot be reached .offline mode is enabled"),
        (ConnectionError("Name or service not known"), "cannot be reached"),
        (LocalEntryNotFoundError("no network"), "cannot be reached"),
    ],
)
def test_failures_become_one_sentence_with_the_licence_page_and_the_alternative(serve, error: Exception, message: str):
    serve(FakeHub(None, [], error))
    with pytest.raises(CheckpointError, match=message) as caught:
        open_source(REPOSITORY)
    assert str(caught.value).startswith(f"no file or directory {REPOSITORY} here, and on the Hub {REPOSITORY} ")
    if not isinstance(error, HFValidationError):
        assert f"https://huggingface.co/{REPOSITORY}" in str(caught.value)
        assert "give the path of a directory that holds it" in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("name", [f"models/sd3{suffix}" for suffix in (".safetensors", ".ckpt", ".pth", ".json")])
def test_a_file_that_is_not_there_is_not_asked_of_the_hub(serve, name: str):
    serve(FakeHub(None, [], AssertionError("the Hub was asked")))
    with pytest.raises(CheckpointError, match=rf"^{re.escape(name)}: no such file or directory"):
        open_source(name)


def test_what_is_absent_in_a_directory_that_is_there_is_not_asked_of_the_hub(serve, tmp_path: Path, monkeypatch):
    serve(FakeHub(None, [], AssertionError("the Hub was asked")))
    (tmp_path / "models").mkdir()
    monkeypatch.chdir(tmp_path)
    with pytest.raises(CheckpointError, match=r"^models/sd3: no such file or directory"):
        open_source("models/sd3")


def test_without_a_network_an_earlier_download_is_used(serve, tmp_path: Path):
    folder = make_checkpoint(tmp_path / "sd3", t5=False)
    serve(FakeHub(folder, [], ConnectionError("down")))
    source = open_source(REPOSITORY)
    assert list(source.configs) == WITHOUT_T5
    source.component("transformer").check()


@pytest.mark.parametrize(
    ("absent", "lacks"),
    [
        (["model_index.json", "transformer", "vae", "text_encoder", "text_encoder_2"], "model_index.json"),
        (["transformer", "text_encoder"], "transformer, text_encoder"),
        (["vae/diffusion_pytorch_model.safetensors", "tokenizer_2"], "vae, tokenizer_2"),
    ],
)
def test_without_a_network_an_incomplete_download_is_explained_in_one_sentence(
    serve, tmp_path: Path, absent: list[str], lacks: str
):
    folder = make_checkpoint(tmp_path / "sd3", t5=False)
    for path in (folder / name for name in absent):
        path.unlink() if path.is_file() else shutil.rmtree(path)
    serve(FakeHub(folder, [], ConnectionError("down")))
    with pytest.raises(CheckpointError, match=f"an earlier download is incomplete: it lacks {lacks}$") as caught:
        open_source(REPOSITORY)
    assert f"https://huggingface.co/{REPOSITORY}" in str(caught.value)
    assert "give the path of a directory that holds it" in str(caught.value)
    assert "\n" not in str(caught.value)


def test_published_tokenizers_that_were_downloaded_in_part_are_not_taken_for_whole(serve, tmp_path: Path):
    (tmp_path / "tokenizer").mkdir()
    serve(FakeHub(tmp_path, []))
    assert hub.fetch_tokenizers(["vae", "text_encoder"]) == tmp_path
    with pytest.raises(CheckpointError, match="an earlier download lacks tokenizer_2; its licence is at"):
        hub.fetch_tokenizers(["text_encoder", "text_encoder_2"])


def test_a_repository_in_another_layout_is_explained(serve, tmp_path: Path):
    serve(FakeHub(tmp_path, ["sd3_medium.safetensors", "README.md"]))
    with pytest.raises(CheckpointError, match=r"no model_index\.json.*download its single safetensors or GGUF file"):
        open_source("stabilityai/stable-diffusion-3-medium")


@pytest.mark.parametrize("text", ["a/b", "stabilityai/stable-diffusion-3.5-large"])
def test_organisation_and_name_make_a_hub_id(text: str):
    assert hub.is_repository_id(text)


@pytest.mark.parametrize("text", ["a", "/a/b", "a/b/c", "./a", "../b", "a/", "a b/c"])
def test_paths_are_not_hub_ids(text: str):
    assert not hub.is_repository_id(text)


# ---- models of transformers ------------------------------------------------------------------------------------------

OF_TRANSFORMERS = """
README.md config.json pytorch_model.bin tf_model.h5 preprocessor_config.json vocab.json
""".split()  # noqa: SIM905


@pytest.mark.parametrize("safe", [True, False])
def test_of_a_model_of_transformers_one_weight_file_is_fetched(serve, safe, tmp_path: Path):
    fake = serve(FakeHub(tmp_path, [*OF_TRANSFORMERS, *(["model.safetensors"] if safe else [])]))
    beside = ("preprocessor_config.json", "vocab.json", "tokenizer.json")
    assert find_folder("openai/clip", beside, "a/b") == tmp_path
    weights = "model.safetensors" if safe else "pytorch_model.bin"
    assert set(fake.fetched) == {"config.json", weights, "preprocessor_config.json", "vocab.json"}


def test_what_scores_pictures_comes_from_the_hub(serve, tmp_path: Path):
    folders = save_scorers(tmp_path)
    for name, load in (("clip", load_clip), ("vit", load_dino), ("dinov2", load_dino)):
        files = [path.name for path in folders[name].iterdir()]
        fake = serve(FakeHub(folders[name], [*files, "README.md", "flax_model.msgpack"]))
        assert load(f"published/{name}").name == f"published/{name}"
        assert sorted(fake.fetched) == sorted(files)


def test_a_repository_without_a_model_of_transformers_is_refused(serve, tmp_path: Path):
    serve(FakeHub(tmp_path, ["config.json", "model.gguf"]))
    with pytest.raises(CheckpointError, match=r"on the Hub a/b lacks config\.json, or model\.safetensors or pytorch"):
        find_folder("a/b", (), "a/b")


def test_without_a_network_an_earlier_download_of_such_a_model_is_used_if_it_is_whole(serve, tmp_path: Path):
    serve(FakeHub(tmp_path, [], ConnectionError("down")))
    with pytest.raises(CheckpointError, match=r"cannot be reached .down.*an earlier download lacks config\.json"):
        find_folder("facebook/dino", (), "a/b")
    for name in ("config.json", "pytorch_model.bin"):
        (tmp_path / name).touch()
    assert find_folder("facebook/dino", (), "a/b") == tmp_path


@pytest.mark.parametrize("error", [ConnectionError("down"), http_error(RepositoryNotFoundError)])
def test_a_model_of_transformers_that_cannot_be_fetched_is_explained_in_one_sentence(serve, error):
    serve(FakeHub(None, [], error))
    with pytest.raises(CheckpointError, match=r"^no file or directory a/b here, and on the Hub a/b ") as caught:
        find_folder("a/b", (), "a/b")
    assert "give the path of a directory that holds it" in str(caught.value)
    assert "\n" not in str(caught.value)
