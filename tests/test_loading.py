"""Loading tells how far it is, and puts low-rank adapters of any format on the transformer."""

from __future__ import annotations

import dataclasses
import gc
import json
import os
import shutil
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.sharding import NamedSharding
from PIL import Image

import seg4diff_jax as s4d
from seg4diff_jax.command_line import main
from seg4diff_jax.convert.checkpoint import convert_checkpoint
from seg4diff_jax.convert.errors import CheckpointError
from seg4diff_jax.convert.load import Unfilled
from seg4diff_jax.convert.lora.adapters import attach_lora, convert_lora, load_lora, save_lora
from seg4diff_jax.convert.sources.open import open_source
from seg4diff_jax.convert.verify.report import verify
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
    with pytest.raises(CheckpointError, match=r"attn_mlp.*seg4diff convert lora .*trained.pth DST --adapters-only"):
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


@pytest.mark.usefixtures("unread")
def test_adapters_of_a_deeper_model_are_refused_when_all_blocks_are_loaded(sd3_checkpoint, adapters, tmp_path):
    config, arrays = load_lora(adapters["native"])
    deeper = arrays | {name.replace("blocks.0.", "blocks.6."): pair for name, pair in arrays.items() if ".0." in name}
    save_lora(tmp_path / "deeper.safetensors", dataclasses.replace(config, blocks=(*range(7),)), deeper)
    with pytest.raises(CheckpointError, match=r"deeper\.safetensors: cannot adapt blocks \[6\]"):
        s4d.load(sd3_checkpoint, lora=tmp_path / "deeper.safetensors")


# ---- configurations -------------------------------------------------------------------------------------------------


def changed(checkpoint: Path, directory: Path, file: str, **values) -> Path:
    """A copy of a checkpoint with other values in one of its JSON files; weights are linked."""
    shutil.copytree(checkpoint, directory, copy_function=os.link)
    config = json.loads((directory / file).read_text())
    (directory / file).unlink()
    (directory / file).write_text(json.dumps(config | values))
    return directory


SCHEDULER = "scheduler/scheduler_config.json"
TRANSFORMER = "transformer/config.json"


@pytest.mark.usefixtures("unread")
@pytest.mark.parametrize(
    ("file", "values", "message"),
    [
        (SCHEDULER, {"use_dynamic_shifting": True}, r"scheduler/scheduler_config\.json: .*use_dynamic_shifting is T"),
        (SCHEDULER, {"shift": None}, r"scheduler/scheduler_config\.json: the scheduler's shift is None"),
        (SCHEDULER, {"shift": 0}, "shift is 0; expected a positive number"),
        (TRANSFORMER, {"expert_step": 29}, r"config\.json: expert_step is 29"),
        (TRANSFORMER, {"expert_block": "2"}, r"config\.json: expert_block is '2'"),
        (TRANSFORMER, {"expert_block": 6}, r"config\.json: expert_block is 6; expected an integer from 0 to 5"),
        (TRANSFORMER, {"expert_block": True}, r"config\.json: expert_block is True"),
    ],
)
def test_what_configurations_say_is_judged_before_weights_are_read(sd3_checkpoint, tmp_path, file, values, message):
    source = changed(sd3_checkpoint, tmp_path / "changed", file, **values)
    with pytest.raises(CheckpointError, match=message):
        s4d.load(source)
    with pytest.raises(CheckpointError, match=message):
        verify(source, size=100)  # refused for its size, were inputs made first


def test_a_wrong_expert_block_is_told_before_anything_is_converted(sd3_checkpoint, tmp_path, monkeypatch):
    source = changed(sd3_checkpoint, tmp_path / "changed", TRANSFORMER, expert_block=6)
    monkeypatch.setattr(
        "seg4diff_jax.convert.checkpoint._write_native", lambda *_: pytest.fail("something was written")
    )
    with pytest.raises(CheckpointError, match="expert_block is 6"):
        convert_checkpoint(source, tmp_path / "native", components=["transformer"])


def test_a_manifest_that_names_no_block_of_the_model_is_refused(sd3_checkpoint, tmp_path):
    convert_checkpoint(sd3_checkpoint, tmp_path / "native", components=["transformer"])
    manifest = tmp_path / "native" / "manifest.json"
    manifest.write_text(json.dumps(json.loads(manifest.read_text()) | {"expert_block": -1}))
    with pytest.raises(CheckpointError, match=r"manifest\.json: expert_block is -1; expected an integer from 0 to 5"):
        open_source(tmp_path / "native")


@pytest.mark.usefixtures("unread")
@pytest.mark.parametrize("blocks", [0, 7, 99, True])
def test_a_number_of_blocks_that_the_transformer_has_not_is_refused_by_name(sd3_checkpoint, blocks):
    with pytest.raises(ValueError, match=f"blocks is {blocks}; expected a whole number from 1 to 6"):
        s4d.load(sd3_checkpoint, blocks=blocks)


def test_a_default_block_that_is_not_loaded_is_called_the_checkpoints_own(sd3):
    short = dataclasses.replace(sd3, expert_block=9)
    with pytest.raises(ValueError, match=r"block, the checkpoint's own, is 9; .* blocks 0\.\.5: load with blocks=10"):
        short.segment(IMAGE, NAMES, size=SIZE)
    with pytest.raises(ValueError, match=r"block is 9; the loaded transformer has blocks 0\.\.5$"):
        short.segment(IMAGE, NAMES, size=SIZE, block=9)


# ---- tokenizers -----------------------------------------------------------------------------------------------------


def test_tokenizers_of_another_model_are_refused(sd3_checkpoint, tmp_path):
    tokenizer = changed(sd3_checkpoint, tmp_path / "long", "tokenizer_2/tokenizer_config.json", model_max_length=80)
    config = json.loads((tokenizer / "tokenizer" / "tokenizer_config.json").read_text()) | {"model_max_length": 80}
    (tokenizer / "tokenizer" / "tokenizer_config.json").unlink()
    (tokenizer / "tokenizer" / "tokenizer_config.json").write_text(json.dumps(config))
    with pytest.raises(CheckpointError) as caught:
        s4d.load(tokenizer)
    both = f"{tokenizer}/tokenizer does not fit {tokenizer}/text_encoder"
    assert f"{both}: its model_max_length is 80, the encoder has 77 positions" in str(caught.value)
    encoder = changed(sd3_checkpoint, tmp_path / "small", "text_encoder_2/config.json", vocab_size=50)
    with pytest.raises(CheckpointError, match=r"small/tokenizer_2 does not fit .*small/text_encoder_2: it makes ids"):
        s4d.load(encoder)
    with pytest.raises(CheckpointError, match=r"small/tokenizer_2 does not fit"):
        verify(encoder)


# ---- progress -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("dtype", "blocks"), [(jnp.float32, None), (jnp.bfloat16, 2)])
def test_progress_counts_the_bytes_of_the_parameters_to_the_last(sd3_checkpoint, dtype, blocks):
    told = []
    pipe = s4d.load(
        sd3_checkpoint, dtype=dtype, blocks=blocks, on_progress=lambda done, total: told.append((done, total))
    )
    models = (pipe.transformer, *pipe.encoders.parts)
    held = sum(leaf.nbytes for model in models for leaf in jax.tree.leaves(nnx.state(model)))
    assert {total for _, total in told} == {held}
    done = [count for count, _ in told]
    assert (done[0], done[-1]) == (0, held)
    assert done == sorted(done)
    assert len(done) > 100


def test_a_copy_without_the_miniatures_weights_says_so(tmp_path, monkeypatch):
    monkeypatch.setattr("seg4diff_jax.convert.sources.open.MINIATURE", tmp_path / "checkpoint")
    with pytest.raises(CheckpointError, match=r"this copy of the package lacks the miniature's weights"):
        s4d.load("miniature")


@pytest.mark.parametrize("adapted", [False, True])
def test_weights_go_with_the_last_name_of_their_pipeline(sd3_checkpoint, adapters, adapted):
    held = lambda: sum(array.nbytes for array in jax.live_arrays())
    gc.collect()
    before = held()
    pipe = s4d.load(sd3_checkpoint, lora=adapters["release"] if adapted else None)
    gc.disable()
    try:
        weights = held() - before
        del pipe
        assert weights > 1e6
        assert held() - before < 0.01 * weights
    finally:
        gc.enable()
