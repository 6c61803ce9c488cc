"""Loading tells how far it is, and puts low-rank adapters of any format on the transformer."""

from __future__ import annotations

import dataclasses
import io
import json
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.sharding import NamedSharding
from PIL import Image
from rich.console import Console

import seg4diff_jax as s4d
from convert.errors import CheckpointError
from convert.load import Unfilled
from convert.lora import attach_lora, convert_lora
from convert.progress import counter, shown
from seg4diff_jax.command_line import main
from seg4diff_jax.models.lora import lora_state
from seg4diff_jax.parallel import make_mesh
from tests.reference.adapters import SUFFIX, factors, mask_head, release_names, write_release
from tests.reference.inputs import BLOCK, NAMES, SIZE, an_image
from tests.reference.random_weights import relative_error

IMAGE = an_image(*SIZE)


@pytest.fixture(scope="module")
def adapters(tmp_path_factory) -> dict[str, Path]:
    """The same adapters in every format."""
    folder = tmp_path_factory.mktemp("adapters")
    files = {"release": write_release(folder / "lora_weights.pth", release_names(factors()))}
    for form in ("native", "diffusers", "peft"):
        files[form] = folder / f"{form}{SUFFIX[form]}"
        convert_lora(files["release"], files[form], to=form)
    return files


@pytest.fixture(scope="module")
def expected(sd3, adapters) -> s4d.Segmentation:
    """Masks with adapters that were put on a loaded pipeline's transformer."""
    adapted = dataclasses.replace(sd3, transformer=attach_lora(sd3.transformer, adapters["release"]))
    return adapted.segment(IMAGE, NAMES, block=BLOCK, size=SIZE)


@pytest.fixture
def unread(monkeypatch):
    """Fails the test when weights are read."""
    monkeypatch.setattr(Unfilled, "fill", lambda *_, **__: pytest.fail("weights were read"))


# ---- adapters -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("form", SUFFIX)
def test_adapters_of_every_format_are_on_the_transformer(sd3, sd3_checkpoint, adapters, expected, form):
    pipe = s4d.load(sd3_checkpoint, blocks=BLOCK + 1, lora=adapters[form])
    assert len(lora_state(pipe.transformer)) == 4 * (BLOCK + 1)  # those of the other blocks are left out
    ours = pipe.segment(IMAGE, NAMES, block=BLOCK, size=SIZE)
    assert relative_error(ours.scores, expected.scores) <= 1e-5
    assert relative_error(sd3.segment(IMAGE, NAMES, block=BLOCK, size=SIZE).scores, expected.scores) > 1e-2


def test_adapters_lie_on_the_mesh(sd3_checkpoint, adapters, expected):
    pipe = s4d.load(sd3_checkpoint, mesh=make_mesh(), lora=adapters["native"])
    adapter = pipe.transformer.stacks[0].image.attention.q
    for factor in (adapter.lora_a, adapter.lora_b):
        assert isinstance(factor.get_value().sharding, NamedSharding)
    ours = pipe.segment(IMAGE, NAMES, block=BLOCK, size=SIZE)
    assert relative_error(ours.scores, expected.scores) <= 1e-5


@pytest.mark.usefixtures("unread")
def test_tensors_that_are_no_adapters_are_refused_before_weights_are_read(sd3_checkpoint, tmp_path):
    file = write_release(tmp_path / "trained.pth", release_names(factors()) | mask_head())
    with pytest.raises(CheckpointError, match=r"attn_mlp.*python -m convert lora .*trained.pth DST --adapters-only"):
        s4d.load(sd3_checkpoint, lora=file)


@pytest.mark.usefixtures("unread")
def test_adapters_of_another_model_are_refused_before_weights_are_read(sd35_large_checkpoint, adapters):
    with pytest.raises(CheckpointError, match=r"lora_weights.pth: adapters do not match the model:\n.*wrong shape"):
        s4d.load(sd35_large_checkpoint, lora=adapters["release"])


@pytest.mark.usefixtures("unread")
def test_adapters_that_are_not_there_are_named(sd3_checkpoint, tmp_path):
    with pytest.raises(CheckpointError, match=r"absent\.pth: no such file"):
        s4d.load(sd3_checkpoint, lora=tmp_path / "absent.pth")


def test_segment_takes_adapters(tmp_path, sd3_checkpoint, adapters, capsys):

    Image.fromarray(IMAGE).save(tmp_path / "image.png")
    arguments = ["segment", str(tmp_path / "image.png"), "cat", "dog", "--model", str(sd3_checkpoint), "--block", "1"]
    size = f"{SIZE[0]}x{SIZE[1]}"
    arguments += ["--size", size, "--lora", str(adapters["peft"]), "--out", str(tmp_path / "out")]
    assert main(arguments) == 0
    assert f"adapters of {adapters['peft']}" in capsys.readouterr().err
    assert json.loads((tmp_path / "out" / "segmentation.json").read_text())["lora"] == str(adapters["peft"])
    pipe = s4d.load(sd3_checkpoint, lora=adapters["peft"])
    expected = pipe.segment(IMAGE, ["cat", "dog"], block=1, size=SIZE)
    with np.load(tmp_path / "out" / "scores.npz") as saved:
        assert relative_error(saved["scores"], expected.scores) <= 1e-5


# ---- progress -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("dtype", "blocks"), [(jnp.float32, None), (jnp.bfloat16, 2)])
def test_progress_counts_the_bytes_of_the_parameters_to_the_last(sd3_checkpoint, dtype, blocks):
    told = []
    pipe = s4d.load(sd3_checkpoint, dtype=dtype, blocks=blocks, progress=lambda done, total: told.append((done, total)))
    models = (pipe.transformer, pipe.vae, pipe.clip_l, pipe.clip_g)
    held = sum(leaf.nbytes for model in models for leaf in jax.tree.leaves(nnx.state(model)))
    assert {total for _, total in told} == {held}
    done = [count for count, _ in told]
    assert (done[0], done[-1]) == (0, held)
    assert done == sorted(done)
    assert len(done) > 100


def show(console: Console) -> str:
    with shown(console, "loading [sd3]") as told:
        advance = counter(told, 4_000_000)
        for _ in range(4):
            advance(1_000_000)
    return console.file.getvalue()  # pyright: ignore


def test_progress_is_a_bar_at_a_terminal():
    printed = show(Console(file=io.StringIO(), force_terminal=True, width=120))
    assert "loading [sd3]" in printed
    assert "━" in printed
    assert "4.0/4.0 MB" in printed


def test_progress_is_one_plain_line_elsewhere():
    assert show(Console(file=io.StringIO(), width=20)) == "loading [sd3]: 4.0 MB\n"
