"""`verify` passes on sound weights, names what is wrong with unsound ones, and holds one block at a time."""

from __future__ import annotations

import json
import math
import shutil
import sys
import weakref
from collections.abc import Callable
from dataclasses import replace
from os import link
from pathlib import Path
from shutil import copy
from typing import Any

import jax
import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from seg4diff_jax.convert.__main__ import main
from seg4diff_jax.convert.checkpoint import convert_checkpoint
from seg4diff_jax.convert.command_line import verify as verify_command
from seg4diff_jax.convert.errors import CheckpointError
from seg4diff_jax.convert.sources.open import open_source
from seg4diff_jax.convert.verify import jax_side, torch_side
from seg4diff_jax.convert.verify.comparison import BOUNDS, FACTOR, Recording, compare, decided_labels
from seg4diff_jax.convert.verify.inputs import draw_picture
from seg4diff_jax.convert.verify.report import verify
from seg4diff_jax.models.sd3.block import JointBlock
from seg4diff_jax.models.t5 import T5Block
from tests.reference.checkpoints import Variant
from tests.reference.single_file import make_both

SIZE = ["--size", "128"]
BLOCKS = {"sd3": 6, "sd3.5-medium": 5, "sd3.5-large": 8}


def expected_rows(blocks: int, *, t5: bool = True, expert: int | None = None) -> list[str]:
    expert = blocks // 2 if expert is None else expert
    rows = ["vae: latents of the picture", "vae: decoded pixels"]
    rows += [f"text_encoder{n}: {what}" for n in ("", "_2") for what in ("penultimate states", "pooled")]
    rows += ["text_encoder_3: states"] * t5
    rows += ["prompt: joint context", "prompt: pooled", "scheduler: timesteps", "scheduler: noisy latents"]
    rows += [f"transformer: {what}" for what in ("embedded latents", "embedded context", "conditioning")]
    for number in range(blocks):
        rows += ["expert block: image-to-text probs"] * (number == expert)
        rows += [f"block {number}: {what}" for what in ("image-to-text scores", "image-to-text probs", "image stream")]
        rows += [f"block {number}: text stream"] * (number < blocks - 1)
    return [*rows, "velocity", "class scores", "masks"]


@pytest.mark.parametrize("variant", BLOCKS)
def test_every_part_of_a_sound_checkpoint_passes(
    checkpoint_factory, variant: Variant, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    source = str(checkpoint_factory(variant=variant))
    assert main(["verify", source, *SIZE, "--json", str(tmp_path / "rows.json")]) == 0
    report = json.loads((tmp_path / "rows.json").read_text())
    assert report["source"] == source
    assert report["passed"] is True
    assert [row["what"] for row in report["rows"]] == expected_rows(BLOCKS[variant])
    for row in report["rows"]:
        assert row["passed"]
        if row["what"] == "masks":
            assert row["shape"] == [128, 128]
            assert row["equal"] == 1
            assert row["decided"] > 0.99
        else:
            assert 0 <= row["relative_error"] <= 2e-5
            assert row["cosine"] > 1 - 1e-8
    shapes = {row["what"]: row["shape"] for row in report["rows"]}
    heads = {"sd3": 4, "sd3.5-medium": 4, "sd3.5-large": 6}[variant]
    assert shapes["block 0: image-to-text probs"] == [1, heads, 64, 77]
    assert shapes["prompt: joint context"] == [1, 154, 96]
    printed = capsys.readouterr().out
    assert all(row in printed for row in expected_rows(BLOCKS[variant]))
    assert "prompt 'cat grass sky'" in printed
    assert f"masks from block {BLOCKS[variant] // 2}, the middle one: no expert block is named" in printed


def test_bfloat16_is_as_near_to_float32_in_jax_as_in_pytorch(sd35_medium_checkpoint: Path):
    report = verify(sd35_medium_checkpoint, size=128, dtype="bfloat16", components=["vae", "transformer"])
    assert not report.failures
    for row in report.rows:
        assert row.distance is not None
        assert row.reference_distance is not None
        if row.equal is None:
            assert row.distance <= FACTOR * row.reference_distance + BOUNDS["bfloat16"].rounding
    streams = [row for row in report.rows if row.what.endswith("image stream")]
    assert all(1e-3 < row.distance < 0.1 for row in streams if row.distance is not None)
    assert "seeded random context (no text encoder)" in report.notes


Change = Callable[[str, torch.Tensor], torch.Tensor]


def changed(original: Path, directory: Path, changes: dict[str, Change]) -> Path:
    """A copy of a checkpoint in which the tensors of each named component have gone through a function."""
    directory.mkdir()
    for path in original.iterdir():
        if path.name not in changes:
            (directory / path.name).symlink_to(path)
    for component, change in changes.items():
        (file,) = (original / component).glob("*.safetensors")
        state = {name: change(name, tensor) for name, tensor in load_file(file).items()}
        (directory / component).mkdir()
        (directory / component / "config.json").write_bytes((original / component / "config.json").read_bytes())
        save_file(state, directory / component / file.name, {"format": "pt"})
    return directory


def noise_on(wanted: str) -> Change:
    """Add noise of a tenth of a tensor's own size."""

    def change(name: str, tensor: torch.Tensor) -> torch.Tensor:
        noise = torch.randn(tensor.shape, generator=torch.Generator().manual_seed(0))
        return tensor + 0.1 * tensor.std() * noise if name == wanted else tensor

    return change


def test_changed_weights_of_a_converted_directory_fail_where_they_are_and_nowhere_else(
    sd3_checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    wrong = {
        "transformer": noise_on("transformer_blocks.2.ff.net.2.weight"),
        "text_encoder": noise_on("text_projection.weight"),
    }
    convert_checkpoint(changed(sd3_checkpoint, tmp_path / "changed", wrong), tmp_path / "native")
    rows = tmp_path / "rows.json"
    arguments = ["verify", str(tmp_path / "native"), "--against", str(sd3_checkpoint), *SIZE, "--json", str(rows)]
    assert main(arguments) == 1
    report = json.loads(rows.read_text())
    assert report["passed"] is False
    assert [row["what"] for row in report["rows"]] == expected_rows(6)
    failed = {row["what"] for row in report["rows"] if not row["passed"]}
    later = {row for row in expected_rows(6) if row.startswith(("expert", "block 3", "block 4", "block 5", "velocity"))}
    # Masks come from block 3; labels differ only where scores that are so far apart may decide.
    expected = {"text_encoder: pooled", "prompt: pooled", "block 2: image stream", "class scores"} | later
    assert failed - {"masks"} == expected
    told = capsys.readouterr()
    assert f"error: {len(failed)} of {len(expected_rows(6))} rows are out of bounds; the first is" in told.err
    assert "'text_encoder: pooled'" in told.err
    (line,) = [line for line in told.out.splitlines() if "block 2: image stream" in line]
    assert "FAIL" in line


def test_a_row_out_of_its_bound_passes_if_pytorch_is_as_far_from_its_own_float64(
    sd3_checkpoint: Path, monkeypatch: pytest.MonkeyPatch
):
    strict = replace(BOUNDS["float32"], relative=1e-8, equal=1.1)
    monkeypatch.setitem(BOUNDS, "float32", strict)
    plain, judged = (
        verify(sd3_checkpoint, size=128, components=["transformer"], float64=float64) for float64 in (False, True)
    )
    assert len(plain.failures) > 20
    assert not judged.failures
    assert "exact: PyTorch in float64" in judged.notes
    for row in judged.rows:
        assert row.distance is not None
        assert row.distance < 1e-4  # computed in float32, whatever excuses it


def test_weights_that_were_rounded_in_conversion_are_told_of(sd3_checkpoint: Path, tmp_path: Path):
    convert_checkpoint(sd3_checkpoint, tmp_path / "native", components=["vae"], dtype="bfloat16")
    report = verify(tmp_path / "native", sd3_checkpoint, size=64)
    assert {row.what for row in report.failures} == {"vae: latents of the picture", "vae: decoded pixels"}
    assert "the weights' own rounding is in these errors: vae in bfloat16, in the original float32" in report.notes


def test_a_single_file_without_tokenizers_is_verified_through_diffusers_own_conversion(tmp_path: Path):
    _, single = make_both(tmp_path, dual=True)
    parts = ["transformer", "vae", "text_encoder", "text_encoder_3"]
    reports = [verify(single, size=128, components=names) for names in (parts, ["text_encoder_2"])]
    rows = [row for report in reports for row in report.rows]
    assert all(row.passed for row in rows)
    assert {row.what for row in rows} == {row for row in expected_rows(3) if not row.startswith("prompt")}
    assert all("seeded random token ids (no tokenizers)" in report.notes for report in reports)


def test_one_block_is_in_memory_at_a_time_and_each_kind_is_compiled_once(
    sd35_medium_checkpoint: Path, monkeypatch: pytest.MonkeyPatch
):
    def in_memory(module: torch.nn.Module) -> bool:
        return not any(parameter.is_meta for parameter in module.parameters())

    torch_layers: list[torch.nn.Module] = []
    jax_layers: list[weakref.ref] = []
    load_torch, load_jax = torch_side._load, jax_side.load_layer

    def watched_torch(module, tensors, dtype, prefix="", but=()):
        if prefix:
            assert not any(in_memory(layer) for layer in torch_layers)
            torch_layers.append(module)
        load_torch(module, tensors, dtype, prefix, but)
        assert not prefix or in_memory(module)

    def watched_jax(*arguments):
        assert all(layer() is None for layer in jax_layers)
        layer = load_jax(*arguments)
        jax_layers.append(weakref.ref(layer))
        return layer

    jax.clear_caches()  # other tests may have compiled the same
    traced: list[str] = []
    for kind in (JointBlock, T5Block):
        call = kind.__call__
        monkeypatch.setattr(
            kind, "__call__", lambda *a, call=call, name=kind.__name__, **k: (traced.append(name), call(*a, **k))[1]
        )
    monkeypatch.setattr(torch_side, "_load", watched_torch)
    monkeypatch.setattr(jax_side, "load_layer", watched_jax)
    report = verify(sd35_medium_checkpoint, size=64, components=["transformer", "text_encoder_3"])
    assert not report.failures
    assert len(torch_layers) == len(jax_layers) == 5 + 3
    assert not any(in_memory(layer) for layer in torch_layers)
    assert all(layer() is None for layer in jax_layers)
    assert sorted(traced) == ["JointBlock"] * 3 + ["T5Block"]  # with a second attention, without, and the last


def test_t5_can_be_left_out(sd35_medium_checkpoint: Path):
    components = ["text_encoder", "text_encoder_2", "transformer", "vae"]
    report = verify(sd35_medium_checkpoint, size=128, components=components)
    assert not report.failures
    assert [row.what for row in report.rows] == expected_rows(5, t5=False)


def linked(original: Path, directory: Path) -> Path:
    """A copy whose small files may be written; weights are linked."""
    return Path(shutil.copytree(original, directory, copy_function=lambda a, b: (link if "safe" in a else copy)(a, b)))


def configure(file: Path, **values: Any) -> None:
    file.write_text(json.dumps(json.loads(file.read_text()) | values))


def test_without_t5_its_zeros_are_computed_once_as_the_pipeline_does(
    sd3_checkpoint: Path, monkeypatch: pytest.MonkeyPatch
):
    counts: list[int] = []
    call, alone = JointBlock.__call__, jax_side.attention_record
    jax.clear_caches()
    monkeypatch.setattr(JointBlock, "__call__", lambda *a: (counts.append(a[1].last_token_count), call(*a))[1])
    monkeypatch.setattr(jax_side, "attention_record", lambda *a: (counts.append(a[1].last_count), alone(*a))[1])
    report = verify(sd3_checkpoint, size=64, components=["text_encoder", "text_encoder_2", "transformer"])
    assert not report.failures
    assert set(counts) == {77}
    (row,) = [row for row in report.rows if row.what == "block 0: text stream"]
    assert row.shape == (1, 154, 64)
    counts.clear()
    assert not verify(sd3_checkpoint, size=64, components=["transformer"]).failures
    assert set(counts) == {1}


def test_a_checkpoints_own_expert_block_noise_level_and_prompt_length_are_those_compared(
    sd3_checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    source = linked(sd3_checkpoint, tmp_path / "own")
    configure(source / "transformer" / "config.json", expert_block=1, expert_step=20)
    for name in ("tokenizer", "tokenizer_2"):
        configure(source / name / "tokenizer_config.json", model_max_length=40)
    timesteps: list[float] = []
    embed = jax_side._embed
    monkeypatch.setattr(jax_side, "_embed", lambda *a: (timesteps.extend(a[2]), embed(*a))[1])
    report = verify(source, size=64, components=["text_encoder", "text_encoder_2", "transformer"])
    assert not report.failures
    rows = [row.what for row in report.rows]
    assert rows.index("expert block: image-to-text probs") == rows.index("block 1: image-to-text scores") - 1
    assert timesteps == pytest.approx([1000 * open_source(source).schedule.sigma_at(20)] * len(timesteps))
    shapes = {row.what: row.shape for row in report.rows}
    assert shapes["prompt: joint context"] == (1, 80, 96)
    assert shapes["expert block: image-to-text probs"] == (1, 16, 40)


def test_what_cannot_be_compared_is_refused_in_a_sentence(
    sd3_checkpoint: Path, sd35_large_checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    native = tmp_path / "native"
    convert_checkpoint(sd3_checkpoint, native, components=["vae"])
    with pytest.raises(CheckpointError, match="is a converted directory, which PyTorch cannot read: give the original"):
        verify(native)
    with pytest.raises(CheckpointError, match="is a converted directory"):
        verify(native, against=native)
    with pytest.raises(CheckpointError, match=r"transformer: .* describe different models"):
        verify(sd3_checkpoint, against=sd35_large_checkpoint)
    with pytest.raises(CheckpointError, match="--size 100: this checkpoint takes multiples of 16, up to 384"):
        verify(sd3_checkpoint, size=100)
    with pytest.raises(CheckpointError, match="--size 512"):
        verify(sd3_checkpoint, size=512)
    monkeypatch.delitem(sys.modules, "seg4diff_jax.convert.verify.torch_side")
    monkeypatch.delattr("seg4diff_jax.convert.verify.torch_side")
    monkeypatch.setitem(sys.modules, "diffusers", None)
    with pytest.raises(CheckpointError, match=r"diffusers is not installed: .* type pip install -e '\.\[convert\]'"):
        verify(sd3_checkpoint)


def test_a_file_for_the_rows_that_cannot_be_written_is_told_before_the_run(
    sd3_checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    monkeypatch.setattr(verify_command, "verify", lambda *_, **__: pytest.fail("it ran"))
    for file in (tmp_path, tmp_path / "absent" / "rows.json"):
        assert main(["verify", str(sd3_checkpoint), "--json", str(file)]) == 1
        assert f"error: --json {file}: cannot be written" in capsys.readouterr().err

    def refuse(*_: Any, **__: Any) -> None:
        raise CheckpointError("refused")

    monkeypatch.setattr(verify_command, "verify", refuse)
    (tmp_path / "former.json").write_text("{}")
    for name in ("former.json", "new.json"):
        assert main(["verify", str(sd3_checkpoint), "--json", str(tmp_path / name)]) == 1
    assert [path.name for path in tmp_path.iterdir()] == ["former.json"]
    assert (tmp_path / "former.json").read_text() == "{}"


def test_errors_are_those_of_the_definitions():
    theirs = np.asarray([[1.0, -4.0], [2.0, 0.0]], np.float32)
    ours = theirs + np.asarray([[0.0, 2e-4], [-3e-4, 0.0]], np.float32)
    row = compare("x", ours, theirs)
    assert row.max_error == pytest.approx(3e-4, rel=1e-3)
    assert row.relative_error == pytest.approx(3e-4 / 4, rel=1e-3)
    assert row.cosine == pytest.approx((1 + 4 * 3.9998 + 2 * 1.9997) / math.sqrt(21 * (1 + 3.9998**2 + 1.9997**2)))
    assert row.passed
    assert not compare("x", theirs + np.float32(5e-4), theirs).passed


def test_what_is_not_finite_or_not_of_one_shape_never_passes():
    theirs = np.ones((2, 2), np.float32)
    for value in (np.nan, np.inf):
        ours = theirs.copy()
        ours[0, 0] = value
        assert not compare("x", ours, theirs).passed
        assert not compare("x", theirs, ours).passed
        assert not compare("x", ours, theirs, exact=theirs).passed
    assert not compare("x", theirs, 0 * theirs).passed
    assert compare("x", 0 * theirs, 0 * theirs).passed
    with pytest.raises(ValueError, match=r"PyTorch's shape is \[1, 2\], ours is \[2, 2\]"):
        compare("x", theirs, theirs[:1])


def test_label_maps_pass_by_equal_labels_where_rounding_cannot_decide():
    theirs = np.zeros((100, 100), np.int32)
    ours = theirs.copy()
    assert compare("masks", ours, theirs).passed
    ours[0, 0] = 1
    row = compare("masks", ours, theirs)
    assert (row.equal, row.decided) == (0.9999, 1)
    assert not row.passed
    decided = np.ones(theirs.shape, bool)
    decided[0, :2] = False
    row = compare("masks", ours, theirs, decided=decided)
    assert (row.equal, row.decided) == (1, 0.9998)
    assert row.passed
    assert not compare("masks", ours, theirs, decided=~decided).passed
    assert not compare("masks", theirs, theirs, decided=np.zeros_like(decided)).passed


def test_rounding_cannot_decide_where_one_class_leads_by_more_than_scores_are_apart():
    theirs = np.array([[[0.5, 0.5, 0.5]], [[0.4, 0.49, 0.5]], [[0.1, 0.2, 0.3]]], np.float32)
    ours = theirs.copy()
    ours[0, 0, 0] += np.float32(0.01)  # apart by 0.01: a lead of 0.02 could be lost
    np.testing.assert_array_equal(decided_labels(ours, theirs), [[True, False, False]])
    np.testing.assert_array_equal(decided_labels(theirs, theirs), [[True, True, False]])
    np.testing.assert_array_equal(decided_labels(np.full_like(ours, np.nan), theirs), [[False] * 3])
    np.testing.assert_array_equal(decided_labels(ours[:1], theirs[:1]), [[True] * 3])


def test_the_miniature_is_verified_at_the_largest_size_that_it_takes(capsys):
    assert main(["verify", "miniature"]) == 0
    assert "96 px" in capsys.readouterr().out


def test_in_bfloat16_the_distance_of_pytorch_itself_is_the_measure():
    exact = np.ones(1000, np.float32)
    theirs = exact * np.float32(1.01)
    assert compare("x", exact * np.float32(0.98), theirs, exact, BOUNDS["bfloat16"]).passed
    row = compare("x", exact * np.float32(0.97), theirs, exact, BOUNDS["bfloat16"])
    assert row.distance == pytest.approx(0.03, rel=1e-5)
    assert row.reference_distance == pytest.approx(0.01, rel=1e-5)
    assert not row.passed


def test_in_float32_the_distance_from_an_exact_array_excuses_what_the_fixed_bound_does_not():
    exact = np.ones(1000)
    theirs, near, far = ((exact * scale).astype(np.float32) for scale in (1.001, 0.9985, 0.997))
    assert not compare("x", near, theirs).passed
    assert compare("x", near, theirs, exact).passed
    assert not compare("x", far, theirs, exact).passed
    assert compare("x", theirs + np.float32(5e-5), theirs, theirs).passed  # the fixed bound is enough


def test_a_recording_gives_each_array_once(tmp_path: Path):
    recording = Recording(tmp_path / "recording")
    recording.record("a", np.arange(3))
    recording.record("b", np.ones(2))
    with pytest.raises(ValueError, match="a is recorded twice"):
        recording.record("a", np.arange(3))
    np.testing.assert_array_equal(recording.take("a"), np.arange(3))
    assert recording.left == ["b"]


def test_the_test_picture_is_in_range_and_its_parts_differ():
    picture = draw_picture(64)
    assert picture.shape == (1, 64, 64, 3)
    assert picture.dtype == np.float32
    assert np.abs(picture).max() <= 1
    sky, meadow, cat = picture[0, 5, 60], picture[0, 60, 60], picture[0, 40, 29]
    assert min(np.abs(a - b).max() for a, b in ((sky, meadow), (sky, cat), (meadow, cat))) > 0.3
