"""JSON of checkpoints that is damaged or hostile is answered at once, in one sentence that names the file."""

from __future__ import annotations

import json
import os
import re
import shutil
import time
from pathlib import Path
from typing import Any

import pytest

from seg4diff_jax.convert import files
from seg4diff_jax.convert.checkpoint import convert_checkpoint
from seg4diff_jax.convert.configurations import BOUNDS, check_values
from seg4diff_jax.convert.errors import CheckpointError
from seg4diff_jax.convert.files import parse_json, read_json
from seg4diff_jax.convert.load import load_component
from seg4diff_jax.convert.sources.open import MINIATURE, open_source
from seg4diff_jax.models.t5 import T5Config


def look(source: Path, component: str) -> None:
    """Open a checkpoint and look at the names of its tensors; no numbers are read."""
    open_source(source).component(component).check()


def refusal(source: Path, component: str = "vae") -> str:
    begun = time.perf_counter()
    with pytest.raises(CheckpointError) as caught:
        look(source, component)
    assert time.perf_counter() - begun < 20, "seconds on a busy machine, not the hours of a claimed size"
    return str(caught.value)


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    """The miniature; weights are linked."""
    return Path(shutil.copytree(MINIATURE, tmp_path / "sd3", copy_function=os.link))


@pytest.fixture(scope="module")
def converted(tmp_path_factory: pytest.TempPathFactory) -> Path:
    target = tmp_path_factory.mktemp("converted") / "native"
    convert_checkpoint(MINIATURE, target, components=["vae", "text_encoder"])
    return target


@pytest.fixture
def native(converted: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(converted, tmp_path / "native", copy_function=os.link))


def rewrite(file: Path, **values: Any) -> None:
    """Other values, in a file of its own: the original is linked."""
    changed = json.loads(file.read_text()) | values
    file.unlink()
    file.write_text(json.dumps(changed))


@pytest.mark.parametrize(
    ("contents", "said"),
    [
        (b'{"a": NaN}', "NaN"),
        (b'{"a": -Infinity}', "-Infinity"),
        (b'{"a": 1e999}', "1e999"),
        (b'{"a": 1, "b": {"c": 1, "c": 1}}', "'c' occurs twice"),
        (b'{"a": ' + b"9" * 5000 + b"}", "a number of 5000 digits"),
        (b'{"a": ' * 65 + b"1" + b"}" * 65, "more than 64 objects or lists inside each other"),
        (b"[" * 100_000, "more than 64 objects or lists inside each other"),
        (b"\xff\xfe{}", "can't decode"),
        (b'{"half": ', "not JSON"),
        (b"[]", "expected a JSON object, found a list"),
        (b"null", "expected a JSON object, found a NoneType"),
    ],
)
def test_what_is_no_json_of_finite_numbers_and_unique_keys_is_refused_by_file(tmp_path, contents, said):
    file = tmp_path / "config.json"
    file.write_bytes(contents)
    with pytest.raises(CheckpointError, match=f"^{re.escape(str(file))}: .*{re.escape(said)}"):
        read_json(file)


def test_a_file_that_is_too_large_or_no_file_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(files, "LARGEST", 100)
    (tmp_path / "config.json").write_text('{"a": "' + "a" * 100 + '"}')
    with pytest.raises(CheckpointError, match=r"config\.json: .*the file is larger"):
        read_json(tmp_path / "config.json")
    with pytest.raises(CheckpointError, match="cannot be read: Is a directory"):
        read_json(tmp_path)


def test_what_pythons_reader_takes_rightly_is_read_alike(tmp_path):
    value = {"a": [1, -2.5, 1e-300, True, None, "é"], "b": {"c": {}}, "n": 2**64}
    assert parse_json(json.dumps(value), "here") == value
    (tmp_path / "f.json").write_bytes(b"\xef\xbb\xbf" + json.dumps(value).encode())  # as some editors begin a file
    assert read_json(tmp_path / "f.json") == value


@pytest.mark.parametrize("file", ["model_index.json", "transformer/config.json", "scheduler/scheduler_config.json"])
def test_every_file_of_a_checkpoint_is_read_so(checkpoint, file):
    (checkpoint / file).unlink()
    (checkpoint / file).write_text('{"a": 1, "a": 2}')
    assert refusal(checkpoint).startswith(f"{checkpoint / file}: not JSON: 'a' occurs twice")


@pytest.mark.parametrize("entry", [None, "AutoencoderKL", [], ["diffusers"], ["diffusers", None], [1, 2], {}, 3])
@pytest.mark.parametrize("name", ["vae", "text_encoder_3", "scheduler", "tokenizer_2"])
def test_a_part_that_the_index_describes_otherwise_than_by_library_and_class_is_named(checkpoint, name, entry):
    rewrite(checkpoint / "model_index.json", **{name: entry})
    assert refusal(checkpoint).startswith(f"{checkpoint / 'model_index.json'}: {name} is {entry!r}; expected a library")


@pytest.mark.parametrize(
    ("component", "key", "value"),
    [
        ("transformer", "num_layers", 10**9),
        ("transformer", "num_layers", 999),
        ("transformer", "attention_head_dim", 10**12),
        ("transformer", "num_attention_heads", -1),
        ("transformer", "pos_embed_max_size", 10**6),
        ("transformer", "sample_size", 10**9),
        ("transformer", "dual_attention_layers", [10**9]),
        ("transformer", "dual_attention_layers", [0, 0]),
        ("transformer", "_class_name", "FluxTransformer2DModel"),
        ("vae", "layers_per_block", 10**9),
        ("vae", "norm_num_groups", 0),
        ("vae", "norm_num_groups", 7),
        ("vae", "block_out_channels", []),
        ("vae", "block_out_channels", [32] * 9),
        ("vae", "block_out_channels", [0, 64]),
        ("vae", "scaling_factor", 0),
        ("vae", "scaling_factor", -1.5),
        ("vae", "shift_factor", "0"),
        ("vae", "act_fn", "mish"),
        ("text_encoder", "num_hidden_layers", 10**9),
        ("text_encoder", "num_hidden_layers", 999),
        ("text_encoder", "num_attention_heads", 7),
        ("text_encoder", "hidden_act", "relu"),
        ("text_encoder", "hidden_act", []),
        ("text_encoder", "layer_norm_eps", 0.0),
        ("text_encoder_2", "vocab_size", 10**12),
        ("text_encoder_2", "max_position_embeddings", 0),
    ],
)
def test_a_value_that_no_model_has_is_answered_at_once(checkpoint, component, key, value):
    rewrite(checkpoint / component / "config.json", **{key: value})
    message = refusal(checkpoint, component)
    assert message.startswith((f"{checkpoint}: {component}: ", component))
    assert key in message
    assert "\n" not in message


@pytest.mark.parametrize(
    "values",
    [
        {"relative_attention_num_buckets": 2},
        {"relative_attention_max_distance": 8},
        {"num_layers": 10**9},
        {"layer_norm_epsilon": 1e300},
    ],
)
def test_the_same_holds_for_t5(values):
    def parse() -> None:
        check_values(T5Config, values)
        T5Config.from_json({"feed_forward_proj": "gated-gelu", **values})

    with pytest.raises(ValueError, match=next(iter(values))):
        parse()


def test_a_bound_says_what_it_takes():
    for name, bounds in BOUNDS.items():
        assert (bounds.least in bounds) == (not bounds.open), name
        assert float("nan") not in bounds
        assert float("inf") not in bounds
    assert str(BOUNDS["scaling_factor"]) == "more than 0"
    assert str(BOUNDS["layer_norm_eps"]) == "more than 0, up to 1"
    assert str(BOUNDS["num_layers"]) == "1 to 1000"
    assert str(BOUNDS["shift_factor"]) == "-1000 to 1000"


RECORD = {"shape": [3], "dtype": "float32", "crc32": "0123abcd"}


@pytest.mark.parametrize(
    "change",
    [
        {"shape": "3"},
        {"shape": [-3]},
        {"shape": [3.0]},
        {"shape": [True]},
        {"dtype": "finfo"},
        {"dtype": "object"},
        {"dtype": 4},
        {"crc32": 7},
        {"crc32": "x"},
    ],
)
def test_a_parameters_record_of_another_type_is_refused(native, change):
    manifest = json.loads((native / "manifest.json").read_text())
    manifest["components"]["vae"]["base"]["encoder.conv_in.bias"] = RECORD | change
    rewrite(native / "manifest.json", **manifest)
    assert refusal(native).startswith(
        f"{native / 'manifest.json'}: vae: expected each parameter's shape, dtype and crc"
    )


@pytest.mark.parametrize("name", ["../secret.json", "/dev/zero", "vae/../../other", ""])
def test_a_manifest_names_files_of_its_own_directory(native, name):
    rewrite(native / "manifest.json", files={name: "0" * 64})
    assert "expected a file of this directory" in refusal(native)


@pytest.mark.parametrize(
    ("key", "value", "said"),
    [
        ("model_index", {"vae": None}, "model_index: vae is None"),
        (
            "files",
            {"vae/config.json": 3},
            "files: 'vae/config.json': expected a file of this directory and its SHA-256",
        ),
        ("expert_block", True, "expert_block is True"),
        ("components", {"vae": {"../../base": {}}}, "vae: expected each parameter's"),
    ],
)
def test_the_rest_of_a_manifest_is_looked_at_too(native, key, value, said):
    rewrite(native / "manifest.json", **{key: value})
    assert f"{native / 'manifest.json'}: {said}" in refusal(native)


def test_what_is_sound_loads_all_the_same(checkpoint, native):
    for source in (checkpoint, native):
        load_component(open_source(source), "vae")
