"""Adapters go through every format without a bit changed; diffusers and PEFT read ours; nothing is dropped unsaid."""

from __future__ import annotations

import itertools
import json
import os
import sys
from pathlib import Path

import jax
import numpy as np
import pytest
import torch
from diffusers import SD3Transformer2DModel, StableDiffusion3Pipeline
from peft import LoraConfig, PeftModel, get_peft_model, get_peft_model_state_dict
from safetensors.torch import load_file, save_file

from convert.__main__ import main
from convert.errors import CheckpointError
from convert.load import load_component
from convert.lora import attach_lora, convert_lora, load_lora, read_lora, save_lora
from seg4diff_jax.models.lora import IMAGE_ATTENTION, Adapter, LoRAConfig, lora_state
from seg4diff_jax.models.mmdit import MMDiT
from tests.reference.checkpoints import JOINT_WIDTH, POOLED_WIDTH
from tests.reference.random_weights import relative_error
from tests.test_mmdit import forward, make_inputs, run_torch

RANK, WIDTH, BLOCKS = 3, 64, 6
TARGETS = ["to_q", "to_k", "to_v", "to_out.0"]
PREFIX = "backbone.transformer."
NATIVE_KEY, DIFFUSERS_KEY = "lora", "lora_adapter_metadata"
INPUTS = {"in_channels": 16, "joint_attention_dim": JOINT_WIDTH, "pooled_projection_dim": POOLED_WIDTH}
SUFFIX = {"native": ".safetensors", "diffusers": ".safetensors", "peft": "", "release": ".pth"}


def factors(seed: int = 0, dtype: torch.dtype = torch.float32) -> dict[str, torch.Tensor]:
    """Random A and B of every block's image attention, under diffusers' own names."""
    generator = torch.Generator().manual_seed(seed)
    tensors = {}
    for block, module in itertools.product(range(BLOCKS), TARGETS):
        for side, shape in (("A", (RANK, WIDTH)), ("B", (WIDTH, RANK))):
            noise = torch.randn(shape, generator=generator) / shape[1] ** 0.5
            tensors[f"transformer_blocks.{block}.attn.{module}.lora_{side}.weight"] = (0.5 * noise).to(dtype)
    return tensors


def mask_head(dtype: torch.dtype = torch.float32) -> dict[str, torch.Tensor]:
    channels = {0: (64, 1), 2: (64, 64), 4: (1, 64)}
    head = {f"attn_mlp.attn_score_layer.{i}.weight": torch.randn(*shape, 3, 3) for i, shape in channels.items()}
    head |= {f"attn_mlp.attn_score_layer.{i}.bias": torch.randn(shape[0]) for i, shape in channels.items()}
    return {name: tensor.to(dtype) for name, tensor in head.items()}


def release_names(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {PREFIX + name.replace(".weight", ".default.weight"): tensor for name, tensor in tensors.items()}


def write_release(path: Path, tensors: dict, **beside) -> Path:
    torch.save({"model": tensors, **beside}, path)
    return path


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
        with pytest.raises(CheckpointError, match=rf"the {to} format holds adapters alone.*attn_score_layer\.4\.bias"):
            convert_lora(native, tmp_path / f"x{SUFFIX[to]}", to=to)
        convert_lora(native, tmp_path / f"{to}{SUFFIX[to]}", to=to, adapters_only=True)
    with pytest.raises(CheckpointError, match=r"would go unused: attn_mlp\.attn_score_layer\.0\.weight.*adapters_only"):
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
    save_file(tensors | alphas | {name: torch.tensor(7.0)}, tmp_path / "lora.safetensors")
    with pytest.raises(CheckpointError, match=r"alphas: expected one number.*found \[6\.0, 7\.0\]"):
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


class Malicious:
    def __init__(self, command: str):
        self.command = command

    def __reduce__(self):
        return os.system, (self.command,)


def test_a_pickle_with_code_in_it_is_refused_and_not_run(tmp_path, capsys):
    witness = tmp_path / "witness"
    tensors = release_names(factors())
    for number, beside in enumerate(
        ({"hook": Malicious(f"touch {witness}")}, {"model": Malicious(f"touch {witness}")})
    ):
        path = tmp_path / f"{number}.pth"
        torch.save({"model": tensors} | beside, path)
        with pytest.raises(
            CheckpointError, match=r"refused: it refers to \w+\.system, and loading that could run code"
        ):
            load_lora(path)
        assert main(["lora", str(path), str(tmp_path / "out.safetensors")]) == 1
        assert "refused" in capsys.readouterr().err
    assert not witness.exists()
    assert not (tmp_path / "out.safetensors").exists()


OFFENDERS = {
    "transformer_blocks.0.attn.to_q.lora_A.weight": None,
    "transformer_blocks.1.attn.to_q.lora_A.weight": (RANK + 1, WIDTH),
    "transformer_blocks.1.attn.to_q.lora_B.weight": (WIDTH, RANK + 1),
    "transformer_blocks.2.attn.to_k.lora_A.weight": (RANK + 2, WIDTH),
    "transformer_blocks.3.attn.to_v.lora_A.weight": (RANK, WIDTH + 4),
    "transformer_blocks.4.attn.to_v.lora_A.weight": None,
    "transformer_blocks.4.attn.to_v.lora_B.weight": None,
    "transformer_blocks.5.attn.to_k.lora_B.weight": (WIDTH, RANK, 1),
    "transformer_blocks.0.attn.to_w.lora_A.weight": (RANK, WIDTH),
    "transformer_blocks.0.attn.to_q.lora_C.weight": (RANK, WIDTH),
}
FOUND = (
    "transformer_blocks.0.attn.to_q.lora_B{}.weight: its A is missing",
    "transformer_blocks.1.attn.to_q.lora_A{}.weight: expected rank 3, found 4",
    "transformer_blocks.2.attn.to_k.lora_A{}.weight: A and B have different ranks, 5 and 3",
    "transformer_blocks.3.attn.to_v.lora_A{}.weight: the layer has (68, 64) inputs and outputs, in other blocks (64, ",
    "missing: an adapter of blocks.4.image.attention.v",
    "transformer_blocks.5.attn.to_k.lora_B{}.weight: expected a matrix of floating-point numbers",
    "transformer_blocks.0.attn.to_w.lora_A{}.weight is not a tensor of an adapter",
    "transformer_blocks.0.attn.to_q.lora_C{}.weight is not a tensor of an adapter",
)


@pytest.mark.parametrize("form", ["release", "diffusers", "peft"])
def test_every_unknown_incomplete_or_misshapen_tensor_is_listed(tmp_path, form):
    tensors = factors()
    for name, shape in OFFENDERS.items():
        tensors.pop(name, None)
        if shape is not None:
            tensors[name] = torch.zeros(shape)
    path = tmp_path / f"lora{SUFFIX[form]}"
    if form == "release":
        write_release(path, release_names(tensors) | {PREFIX + "pos_embed.proj.weight": torch.zeros(3)})
    elif form == "diffusers":
        save_file({f"transformer.{name}": tensor for name, tensor in tensors.items()}, path)
    else:
        path.mkdir()
        settings = {"peft_type": "LORA", "r": RANK, "lora_alpha": 3, "target_modules": TARGETS}
        (path / "adapter_config.json").write_text(json.dumps(settings))
        save_file({f"base_model.model.{n}": t for n, t in tensors.items()}, path / "adapter_model.safetensors")
    with pytest.raises(CheckpointError) as error:
        load_lora(path)
    problems = FOUND + (("pos_embed.proj.weight is not a tensor of an adapter",) if form == "release" else ())
    for problem in problems:
        assert problem.format(".default" if form == "release" else "") in str(error.value)
    assert f"({len(problems)} problems)" in str(error.value)
    assert str(path) in str(error.value)


def test_text_encoders_adapters_are_not_ignored(tmp_path):
    tensors = {f"transformer.{name}": tensor for name, tensor in factors().items()}
    other = "text_encoder.text_model.encoder.layers.0.self_attn.q_proj.lora_A.weight"
    save_file(tensors | {other: torch.zeros(3, 4)}, tmp_path / "lora.safetensors")
    with pytest.raises(CheckpointError, match=f"surplus: {other}"):
        load_lora(tmp_path / "lora.safetensors")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"use_rslora": True}, "use_rslora is True; it is not implemented"),
        ({"use_dora": True}, "use_dora is True"),
        ({"rank_pattern": {"to_q": 4}}, "rank_pattern is {'to_q': 4}"),
        ({"bias": "lora_only"}, "bias is 'lora_only'; 'none' is implemented"),
        ({"peft_type": "LOHA"}, "peft_type is 'LOHA'"),
        ({"r": 4}, "expected rank 4, found 3"),
        ({"r": None}, "expected numbers as r and lora_alpha, found None and 3"),
        ({"target_modules": [*TARGETS, "add_q_proj"]}, "there is no adapter of add_q_proj, one of target_modules"),
        ({"target_modules": TARGETS[:3]}, "transformer_blocks.5.attn.to_out.0 is not among target_modules"),
        ({"target_modules": r".*\.attn\.to_[qkv]"}, "transformer_blocks.5.attn.to_out.0 is not among target_modules"),
    ],
)
def test_settings_of_peft_that_are_not_implemented_or_not_met_are_refused(tmp_path, change, message):
    settings = {"peft_type": "LORA", "r": RANK, "lora_alpha": 3, "target_modules": TARGETS} | change
    (tmp_path / "adapter_config.json").write_text(json.dumps(settings))
    save_file({f"base_model.model.{n}": t for n, t in factors().items()}, tmp_path / "adapter_model.safetensors")
    with pytest.raises(CheckpointError) as error:
        load_lora(tmp_path)
    assert message in str(error.value)


def test_alpha_is_the_files_own_and_asked_for_only_where_there_is_none(tmp_path, bare_release):
    native = tmp_path / "native.safetensors"
    assert convert_lora(bare_release, native, alpha=4.0).config.alpha == 4.0
    assert load_lora(native)[0].alpha == 4.0
    with pytest.raises(CheckpointError, match="it says alpha is 4; --alpha 16 is for files that do not say"):
        load_lora(native, alpha=16.0)
    with pytest.raises(CheckpointError, match="does not hold alpha, its code takes 16, these adapters have 4"):
        convert_lora(native, tmp_path / "back.pth", to="release")


def test_adapters_that_do_not_fit_the_model_name_file_and_layers(tmp_path, base):
    wide = {n: torch.zeros(RANK, 96) if ".lora_A" in n else torch.zeros(96, RANK) for n in factors()}
    path = write_release(tmp_path / "wide.pth", release_names(wide))
    with pytest.raises(CheckpointError, match=r"wide\.pth: adapters do not match the model") as error:
        attach_lora(base, path)
    assert str(error.value).count("wrong shape: blocks.") == 4 * BLOCKS
    deep = factors() | {
        n.replace(".5.", ".6."): t for n, t in factors().items() if n.startswith("transformer_blocks.5.")
    }
    path = write_release(tmp_path / "deep.pth", release_names(deep))
    with pytest.raises(CheckpointError, match=r"deep\.pth: cannot adapt blocks \[6\]: the model holds blocks 0\.\.5"):
        attach_lora(base, path)
    assert len(lora_state(attach_lora(base, path, drop_absent_blocks=True))) == 4 * BLOCKS


def test_files_that_are_not_adapters_are_named(tmp_path, bare_release):
    empty = tmp_path / "empty"
    empty.mkdir()
    save_file({"weight": torch.zeros(2)}, tmp_path / "other.safetensors")
    torch.save({"model": {"weight": torch.zeros(2)}}, tmp_path / "other.pth")
    (tmp_path / "cut.pth").write_bytes(bare_release.read_bytes()[:5000])
    convert_lora(bare_release, tmp_path / "whole.safetensors")
    (tmp_path / "cut.safetensors").write_bytes((tmp_path / "whole.safetensors").read_bytes()[:-8])
    for name, message in {
        "absent.pth": "no such file or directory",
        "empty": "no adapters: it has neither adapter_config.json nor pytorch_lora_weights.safetensors",
        "other.safetensors": "adapters of an unknown format.*found weight",
        "other.pth": "no adapters: expected a `model` with names like",
        "cut.pth": r"truncated, or not a file of torch\.save",
        "cut.safetensors": "truncated",
    }.items():
        with pytest.raises(CheckpointError, match=f"{name}: {message}"):
            load_lora(tmp_path / name)


def test_a_native_file_whose_header_disagrees_with_its_tensors_is_refused(tmp_path, bare_release):
    path = tmp_path / "native.safetensors"
    convert_lora(bare_release, path)
    tensors = load_file(path)
    stated = {"version": 1, "rank": RANK, "alpha": 16.0, "targets": IMAGE_ATTENTION, "blocks": [0, 1], "others": []}
    for change, message in (
        ({}, r"in blocks \(0, 1\), its tensors are of"),
        ({"version": 9}, "expected version 1, found 9"),
        ({"rank": 4}, "expected rank 4, found 3"),
        ({"others": ["head"]}, "missing: head"),
        ({"rank": None}, "its header does not describe its adapters"),
    ):
        metadata = {"format": "seg4diff-jax lora", NATIVE_KEY: json.dumps(stated | change)}
        save_file(tensors, path, metadata)
        with pytest.raises(CheckpointError, match=message):
            load_lora(path)


def test_without_pytorch_one_sentence_names_the_extra(release, monkeypatch):
    monkeypatch.setitem(sys.modules, "torch", None)
    with pytest.raises(CheckpointError, match=r"need PyTorch: install seg4diff-jax\[convert\]"):
        load_lora(release)


def test_the_command_reports_what_it_kept_and_left_out(tmp_path, release, capsys):
    target = str(tmp_path / "lora.safetensors")
    assert main(["lora", str(release), target]) == 0
    said = capsys.readouterr().err
    assert f"rank {RANK}, alpha 16, 24 adapters" in said
    assert "in blocks 0..5" in said
    assert "kept 6 tensors that are no adapters: attn_mlp.attn_score_layer.0.weight" in said
    assert "left out what is no weights: optimizer, scheduler, iteration" in said
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
