"""Adapters go through every format without a bit changed; diffusers and PEFT read ours; nothing is dropped unsaid."""

from __future__ import annotations

from pathlib import Path

import jax
import numpy as np
import pytest
import torch
from diffusers import SD3Transformer2DModel, StableDiffusion3Pipeline
from peft import LoraConfig, PeftModel, get_peft_model, get_peft_model_state_dict
from safetensors.torch import load_file, save_file

from seg4diff_jax.convert.__main__ import main
from seg4diff_jax.convert.errors import CheckpointError
from seg4diff_jax.convert.load import load_component
from seg4diff_jax.convert.lora.adapters import attach_lora, convert_lora, load_lora, read_lora, save_lora
from seg4diff_jax.models.lora import IMAGE_ATTENTION, Adapter, LoRAConfig, lora_state
from seg4diff_jax.models.sd3.model import MMDiT
from tests.reference.adapters import (
    BLOCKS,
    RANK,
    SUFFIX,
    TARGETS,
    factors,
    mask_head,
    release_names,
    write_release,
)
from tests.reference.checkpoints import JOINT_WIDTH, POOLED_WIDTH
from tests.reference.mmdit import forward, make_inputs, run_torch
from tests.reference.random_weights import relative_error

INPUTS = {"in_channels": 16, "joint_attention_dim": JOINT_WIDTH, "pooled_projection_dim": POOLED_WIDTH}


@pytest.fixture
def release(tmp_path: Path) -> Path:
    """A file in the published form, with a mask head, as detectron2 leaves it after training."""
    state = {"optimizer": {"state": {}}, "scheduler": {"last_epoch": 3}, "iteration": 2999}
    return write_release(tmp_path / "lora_weights.pth", release_names(factors()) | mask_head(), **state)


@pytest.fixture
def bare_release(tmp_path: Path) -> Path:
    return write_release(tmp_path / "bare.pth", release_names(factors()))


@pytest.fixture(scope="module")
def base(sd3_checkpoint: Path) -> MMDiT:
    return load_component(sd3_checkpoint, "transformer")


@pytest.fixture(scope="module")
def inputs() -> dict:
    return make_inputs(INPUTS, (8, 8), text=12, batch=1)


@pytest.fixture
def pipeline(sd3_checkpoint: Path) -> StableDiffusion3Pipeline:
    return StableDiffusion3Pipeline.from_pretrained(sd3_checkpoint)


def transformer(sd3_checkpoint: Path) -> SD3Transformer2DModel:
    return SD3Transformer2DModel.from_pretrained(sd3_checkpoint / "transformer").eval()


def peft_config(alpha: float) -> LoraConfig:
    return LoraConfig(r=RANK, lora_alpha=alpha, target_modules=TARGETS)


def fill(model: torch.nn.Module, seed: int = 4) -> None:
    """Set PEFT's factors in a model to random ones."""
    values = factors(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if ".lora_" in name:
                parameter.copy_(values[name.removeprefix("base_model.model.").replace(".default.weight", ".weight")])


def same_bits(ours: np.ndarray, theirs: torch.Tensor) -> bool:
    theirs = theirs.contiguous()
    return (
        str(ours.dtype) == str(theirs.dtype).removeprefix("torch.")
        and ours.shape == tuple(theirs.shape)
        and np.ascontiguousarray(ours).tobytes() == theirs.view(torch.uint8).numpy().tobytes()
    )


def assert_adapters(adapters: dict[str, Adapter], expected: dict[str, torch.Tensor]) -> None:
    modules = dict(zip(IMAGE_ATTENTION, TARGETS, strict=True))
    assert len(adapters) == len(expected) // 2
    for layer, pair in adapters.items():
        _, block, target = layer.split(".", 2)
        for side, ours in zip("AB", pair, strict=True):
            theirs = expected[f"transformer_blocks.{block}.attn.{modules[target]}.lora_{side}.weight"]
            assert same_bits(ours.T, theirs), (layer, side)


@pytest.mark.parametrize("values", ["tensors", "numpy arrays", "parameters of a wrapped model"])
def test_the_releases_file_is_read_whole_however_it_holds_its_numbers(tmp_path, values):
    tensors = release_names(factors()) | mask_head()
    if values == "numpy arrays":
        tensors = {name: tensor.numpy() for name, tensor in tensors.items()}
    elif values != "tensors":
        tensors = {f"module.{name}": torch.nn.Parameter(tensor) for name, tensor in tensors.items()}
    read = read_lora(write_release(tmp_path / "lora.pth", tensors, iteration=1))
    assert read.config == LoRAConfig(RANK, 16.0, IMAGE_ATTENTION, tuple(range(BLOCKS)))
    assert (read.format, read.left_out) == ("release", ("iteration",))
    assert_adapters(read.adapters, factors())
    assert len(read.others) == 6
    for name, array in read.others.items():
        assert same_bits(array, torch.as_tensor(tensors[name]).detach())
    plain = tmp_path / "plain.pth"
    torch.save(tensors, plain)
    assert read_lora(plain).adapters.keys() == read.adapters.keys()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_every_format_returns_every_bit(tmp_path, dtype):
    """A walk through the formats that takes every step from one to another."""
    source = write_release(tmp_path / "0.pth", release_names(factors(dtype=dtype)))
    walk = ["native", "diffusers", "native", "peft", "native", "release", "diffusers", "release", "peft", "release"]
    walk += ["native", "native", "diffusers", "diffusers", "peft", "peft", "diffusers", "release", "release"]
    for number, to in enumerate(walk, 1):
        target = tmp_path / f"{number}{SUFFIX[to]}"
        convert_lora(source, target, to=to)
        assert read_lora(target).format == to
        source = target
    read = read_lora(source)
    assert read.config == LoRAConfig(RANK, 16.0, IMAGE_ATTENTION, tuple(range(BLOCKS)))
    assert_adapters(read.adapters, factors(dtype=dtype))
    model = torch.load(source, weights_only=True)["model"]
    expected = release_names(factors(dtype=dtype))
    assert model.keys() == expected.keys()
    assert all(torch.equal(model[name], tensor) for name, tensor in expected.items())


def test_the_mask_head_is_kept_where_it_can_be_and_never_dropped_unsaid(tmp_path, release):
    native, back = tmp_path / "native.safetensors", tmp_path / "back.pth"
    convert_lora(release, native)
    convert_lora(native, back, to="release")
    ours, theirs = load_file(native), torch.load(release, weights_only=True)["model"]
    restored = torch.load(back, weights_only=True)["model"]
    assert restored.keys() == theirs.keys()
    assert all(torch.equal(restored[name], tensor) for name, tensor in theirs.items())
    assert {name for name in ours if "attn_mlp" in name} == {name for name in theirs if "attn_mlp" in name}
    for to in ("diffusers", "peft"):
        with pytest.raises(
            CheckpointError, match=rf"the {to} format holds the transformer's adapters alone.*attn_score_layer\.4\.bias"
        ):
            convert_lora(native, tmp_path / f"x{SUFFIX[to]}", to=to)
        convert_lora(native, tmp_path / f"{to}{SUFFIX[to]}", to=to, adapters_only=True)
    with pytest.raises(
        CheckpointError, match=r"would go unused: attn_mlp\.attn_score_layer\.0\.weight.*--adapters-only"
    ):
        load_lora(native)
    assert load_lora(native, adapters_only=True)[1].keys() == load_lora(tmp_path / "peft")[1].keys()


def test_diffusers_loads_our_export_and_computes_what_we_compute(tmp_path, pipeline, base, inputs):
    source = write_release(tmp_path / "lora.pth", release_names(factors()))
    with torch.no_grad():
        plain = run_torch(pipeline.transformer, inputs)
    target = tmp_path / "export.safetensors"
    convert_lora(source, target, to="diffusers", alpha=7.5)
    pipeline.load_lora_weights(target)
    with torch.no_grad():
        expected = run_torch(pipeline.transformer, inputs)
    assert relative_error(plain.numpy(), expected) > 1e-2
    assert relative_error(forward(attach_lora(base, target), inputs)[0], expected) <= 1e-5


@pytest.mark.parametrize("with_settings", [True, False])
def test_what_diffusers_saves_is_read(tmp_path, sd3_checkpoint, with_settings):
    model = transformer(sd3_checkpoint)
    model.add_adapter(peft_config(alpha=8))
    fill(model)
    settings = {"transformer_lora_adapter_metadata": model.peft_config["default"].to_dict()} if with_settings else {}
    StableDiffusion3Pipeline.save_lora_weights(tmp_path / "lora", get_peft_model_state_dict(model), **settings)
    config, adapters = load_lora(tmp_path / "lora")
    assert config == LoRAConfig(RANK, 8.0 if with_settings else float(RANK), IMAGE_ATTENTION, tuple(range(BLOCKS)))
    assert_adapters(adapters, factors(seed=4))
    if not with_settings:
        assert load_lora(tmp_path / "lora", alpha=8.0)[0].alpha == 8.0


def test_diffusers_former_alpha_tensors_are_read(tmp_path):
    tensors = {f"transformer.{name}": tensor for name, tensor in factors().items()}
    alphas = {name.split(".lora_")[0] + ".alpha": torch.tensor(6.0) for name in tensors}
    save_file(tensors | alphas, tmp_path / "lora.safetensors")
    assert load_lora(tmp_path / "lora.safetensors")[0].alpha == 6.0
    name = "transformer.transformer_blocks.2.attn.to_k.alpha"
    del alphas[name]
    save_file(tensors | alphas, tmp_path / "lora.safetensors")
    with pytest.raises(CheckpointError, match=r"missing: the alpha of blocks\.2\.image\.attention\.k"):
        load_lora(tmp_path / "lora.safetensors")


def test_peft_and_we_read_each_others_directories(tmp_path, sd3_checkpoint, base, inputs):
    model = get_peft_model(transformer(sd3_checkpoint), peft_config(alpha=5))
    fill(model)
    model.save_pretrained(tmp_path / "theirs")
    config, adapters = load_lora(tmp_path / "theirs")
    assert config == LoRAConfig(RANK, 5.0, IMAGE_ATTENTION, tuple(range(BLOCKS)))
    assert_adapters(adapters, factors(seed=4))
    convert_lora(tmp_path / "theirs" / "adapter_model.safetensors", tmp_path / "ours", to="peft")
    again = PeftModel.from_pretrained(transformer(sd3_checkpoint), tmp_path / "ours").base_model.model
    with torch.no_grad():
        expected = run_torch(again.eval(), inputs)
    assert relative_error(forward(attach_lora(base, tmp_path / "ours"), inputs)[0], expected) <= 1e-5


def test_adapters_of_a_model_are_saved_and_loaded_unchanged(tmp_path, base, bare_release):
    adapted = attach_lora(base, bare_release, alpha=2.5)
    state = lora_state(adapted)
    config = LoRAConfig(RANK, 2.5)
    save_lora(tmp_path / "trained.safetensors", config, state)
    found, adapters = load_lora(tmp_path / "trained.safetensors")
    assert found == LoRAConfig(RANK, 2.5, IMAGE_ATTENTION, tuple(range(BLOCKS)))
    assert adapters.keys() == state.keys()
    again = attach_lora(base, tmp_path / "trained.safetensors")
    assert jax.tree.structure(again) == jax.tree.structure(adapted)
    for ours, theirs in zip(jax.tree.leaves(again), jax.tree.leaves(adapted), strict=True):
        np.testing.assert_array_equal(ours, theirs)
    with pytest.raises(CheckpointError, match="expected rank 4, found 3"):
        save_lora(tmp_path / "wrong.safetensors", LoRAConfig(4), state)
    with pytest.raises(CheckpointError, match="exists"):
        save_lora(tmp_path / "trained.safetensors", config, state)


def test_alpha_is_the_files_own_and_asked_for_only_where_there_is_none(tmp_path, bare_release):
    native = tmp_path / "native.safetensors"
    assert convert_lora(bare_release, native, alpha=4.0).config.alpha == 4.0
    assert load_lora(native)[0].alpha == 4.0
    with pytest.raises(CheckpointError, match="it says alpha is 4; --alpha 16 is for files that do not say"):
        load_lora(native, alpha=16.0)
    with pytest.raises(CheckpointError, match="does not hold alpha, its code takes 16, these adapters have 4"):
        convert_lora(native, tmp_path / "back.pth", to="release")


def test_the_command_reports_what_it_kept_and_left_out(tmp_path, release, capsys):
    target = str(tmp_path / "lora.safetensors")
    assert main(["lora", str(release), target]) == 0
    said = capsys.readouterr().err
    assert f"rank {RANK}, alpha 16, 24 adapters" in said
    assert "in blocks 0..5" in said
    assert "kept 6 tensors that are no adapters of the transformer: attn_mlp.attn_score_layer.0.weight" in said
    assert "left out: optimizer, scheduler, iteration" in said
    assert main(["lora", str(release), target]) == 1
    assert "exists" in capsys.readouterr().err
    assert main(["lora", str(release), target, "--to", "diffusers", "--adapters-only", "--overwrite"]) == 0
    assert "left out 6 tensors that are no adapters" in capsys.readouterr().err
    assert read_lora(target).format == "diffusers"
    assert main(["lora", str(release), str(tmp_path / "lora.bin")]) == 1
    assert "must end in .safetensors" in capsys.readouterr().err
    assert main(["lora", target, target, "--overwrite"]) == 1
    assert "is the source" in capsys.readouterr().err
    assert sorted(path.name for path in tmp_path.iterdir()) == ["lora.safetensors", "lora_weights.pth"]
