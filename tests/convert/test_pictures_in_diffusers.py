"""What documents say diffusers loads makes a picture there, which is ours."""

from __future__ import annotations

import re
from pathlib import Path

import numpy as np
import pytest
import torch

import seg4diff_jax as s4d
from seg4diff_jax.convert.__main__ import main
from tests.reference.adapters import factors, release_names, write_release
from tests.reference.diffusers_pictures import loaded, ours, theirs
from tests.reference.documents import DOCUMENTS, ROOT
from tests.reference.single_file import make_both

LOADING = re.compile(r"from_pretrained|from_single_file|\bload_lora\w+|to diffusers\b|\bdiffusers loads\b")
"""Calls of diffusers that load, and what is said to be written for it."""
HERE = "tests/convert/test_pictures_in_diffusers.py"
CHECKPOINT = f"{HERE}::test_a_checkpoint_that_is_converted_back_makes_our_picture"
SINGLE_FILE = f"{HERE}::test_a_single_file_makes_the_picture_of_its_folder"
ADAPTERS = f"{HERE}::test_adapters_that_are_converted_make_our_picture"
RUN = "tests/magnet/test_training.py::test_diffusers_makes_our_picture_with_a_runs_adapters"
EXAMPLE = "tests/test_readme.py::test_the_python_examples_run"
LINES = {
    ("docs/convert.md", "| diffusers | yes | `--to diffusers` |"): CHECKPOINT,
    ("docs/convert.md", "seg4diff convert checkpoint sd3 sd3-diffusers --to diffusers"): CHECKPOINT,
    ("docs/convert.md", "seg4diff convert lora adapters.safetensors sd3-lora.safetensors"): ADAPTERS,
    ("docs/from_diffusers.md", "sd3 = StableDiffusion3Pipeline.from_pretrained("): EXAMPLE,
    ("docs/from_diffusers.md", 'pipe = s4d.load("miniature")'): EXAMPLE,
    ("docs/from_diffusers.md", "| `StableDiffusion3Pipeline.from_pretrained(model)` |"): CHECKPOINT,
    ("docs/from_diffusers.md", "| `from_single_file(file)` |"): SINGLE_FILE,
    ("docs/from_diffusers.md", "| `load_lora_weights(file)` |"): ADAPTERS,
    ("docs/from_diffusers.md", "seg4diff convert checkpoint sd3 sd3-diffusers --to diffusers"): CHECKPOINT,
    ("docs/from_diffusers.md", "seg4diff convert lora runs/mine mine.safetensors"): RUN,
    (
        "docs/from_diffusers.md",
        "seg4diff convert lora adapters.safetensors sd3-lora.safetensors --to diffusers",
    ): ADAPTERS,
    ("docs/from_diffusers.md", 'In diffusers, `sd3.load_lora_weights("mine.safetensors")`'): RUN,
    ("docs/magnet.md", "seg4diff convert lora runs/mine mine.safetensors"): RUN,
    ("docs/miniature.md", "sd3 = StableDiffusion3Pipeline.from_pretrained("): EXAMPLE,
}
"""Document and beginning of each line that names such a call; the test that makes a picture by that route."""


def test_every_line_that_names_a_loading_call_belongs_to_a_route():
    lines = [
        (document, line.strip())
        for document in DOCUMENTS
        for line in (ROOT / document).read_text("utf-8").splitlines()
        if LOADING.search(line)
    ]
    known = lambda document, line: [key for key in LINES if key[0] == document and line.startswith(key[1])]
    assert not [line for line in lines if not known(*line)], "of no route: add a test that makes a picture, and a line"
    assert {key for line in lines for key in known(*line)} == set(LINES), "no such line"


@pytest.mark.parametrize("route", sorted(set(LINES.values())))
def test_every_route_is_a_test(route):
    file, name = route.split("::")
    assert f"def {name}(" in (ROOT / file).read_text("utf-8")


def test_a_checkpoint_that_is_converted_back_makes_our_picture(sd3_checkpoint: Path, tmp_path: Path):
    native, back = tmp_path / "sd3", tmp_path / "sd3-diffusers"
    assert main(["checkpoint", str(sd3_checkpoint), str(native)]) == 0
    assert main(["checkpoint", str(native), str(back), "--to", "diffusers"]) == 0
    expected = theirs(loaded(back))
    assert expected.std() > 10
    # Of equal weights, up to PyTorch's order of sums, which depends on where in memory they lie; in levels of 255.
    np.testing.assert_allclose(expected, theirs(loaded(sd3_checkpoint)), atol=0.01)
    for directory in (native, sd3_checkpoint, back):
        assert np.abs(ours(s4d.load(directory)) - expected).max() <= 1


def test_a_single_file_makes_the_picture_of_its_folder(tmp_path: Path):
    folder, file = make_both(tmp_path, dual=False, dtype=torch.float32)
    expected = theirs(loaded(folder))
    assert expected.std() > 10
    assert np.abs(ours(s4d.load(file, tokenizers=folder)) - expected).max() <= 1


def test_adapters_that_are_converted_make_our_picture(sd3_checkpoint: Path, tmp_path: Path):
    release = write_release(tmp_path / "lora_weights.pth", release_names(factors()))
    adapters, exported = tmp_path / "adapters.safetensors", tmp_path / "sd3-lora.safetensors"
    assert main(["lora", str(release), str(adapters)]) == 0
    assert main(["lora", str(adapters), str(exported), "--to", "diffusers"]) == 0
    pipeline = loaded(sd3_checkpoint)
    plain = theirs(pipeline)
    pipeline.load_lora_weights(exported)
    expected = theirs(pipeline)
    assert np.abs(expected - plain).max() > 10
    for file in (adapters, exported):
        assert np.abs(ours(s4d.load(sd3_checkpoint, lora=file)) - expected).max() <= 1
