"""Adapters under every tool's names give the weights that PEFT's merge of the same numbers gives."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import jax
import numpy as np
import pytest
import torch
from diffusers import SD3Transformer2DModel
from peft import LoraConfig, get_peft_model
from safetensors.torch import save_file

from seg4diff_jax.convert.__main__ import main
from seg4diff_jax.convert.errors import CheckpointError
from seg4diff_jax.convert.load import load_component
from seg4diff_jax.convert.lora.adapters import attach_lora, convert_lora, load_lora, read_lora
from seg4diff_jax.models.lora import merge_lora
from seg4diff_jax.models.sd3.model import MMDiT
from tests.reference.adapters import RANK, factors, release_names

ALPHA = 2.0
Numbers = dict[str, tuple[torch.Tensor, torch.Tensor]]
STABILITY = {
    "attn.to_out.0": "x_block.attn.proj",
    "attn2.to_out.0": "x_block.attn2.proj",
    "ff.net.0.proj": "x_block.mlp.fc1",
    "ff.net.2": "x_block.mlp.fc2",
    "norm1.linear": "x_block.adaLN_modulation.1",
    "attn.to_add_out": "context_block.attn.proj",
    "ff_context.net.0.proj": "context_block.mlp.fc1",
    "ff_context.net.2": "context_block.mlp.fc2",
    "norm1_context.linear": "context_block.adaLN_modulation.1",
}
FUSED = {
    "x_block.attn.qkv": ["attn.to_q", "attn.to_k", "attn.to_v"],
    "x_block.attn2.qkv": ["attn2.to_q", "attn2.to_k", "attn2.to_v"],
    "context_block.attn.qkv": ["attn.add_q_proj", "attn.add_k_proj", "attn.add_v_proj"],
}


@pytest.fixture(scope="module")
def model(sd35_medium_checkpoint: Path) -> Path:
    return sd35_medium_checkpoint


@pytest.fixture(scope="module")
def base(model: Path) -> MMDiT:
    return load_component(model, "transformer")


def transformer(model: Path) -> SD3Transformer2DModel:
    return SD3Transformer2DModel.from_pretrained(model / "transformer")


@pytest.fixture(scope="module")
def numbers(model: Path) -> Numbers:
    """A and B of every linear layer of every block, by diffusers' name; q, k and v of an attention share A."""
    generator = torch.Generator().manual_seed(0)
    noise = lambda *shape: torch.randn(shape, generator=generator) * 0.3
    layers = {
        name: layer
        for name, layer in transformer(model).named_modules()
        if isinstance(layer, torch.nn.Linear) and name.startswith("transformer_blocks.")
    }
    found = {name: (noise(RANK, layer.in_features), noise(layer.out_features, RANK)) for name, layer in layers.items()}
    for name in layers:
        block, module = name.split(".", 2)[1:]
        for first, *others in FUSED.values():
            if module in others:
                found[name] = (found[f"transformer_blocks.{block}.{first}"][0], found[name][1])
    return found


def merged_by_peft(model: Path, numbers: Numbers, work: Path, **settings) -> MMDiT:
    """The model with PEFT's merge of the numbers, converted."""
    options = {"r": RANK, "lora_alpha": ALPHA, "target_modules": list(numbers)} | settings
    adapted = get_peft_model(transformer(model), LoraConfig(**options))
    with torch.no_grad():
        for name, module in adapted.base_model.model.named_modules():
            if name in numbers:
                module.lora_A.default.weight.copy_(numbers[name][0])
                module.lora_B.default.weight.copy_(numbers[name][1])
    shutil.copytree(model, work / "merged", ignore=shutil.ignore_patterns("transformer", "text_encoder*", "vae"))
    adapted.merge_and_unload().save_pretrained(work / "merged" / "transformer")
    return load_component(work / "merged", "transformer")


@pytest.fixture(scope="module")
def merged(model, numbers, tmp_path_factory) -> MMDiT:
    return merged_by_peft(model, numbers, tmp_path_factory.mktemp("peft"))


def assert_same_weights(ours: MMDiT, theirs: MMDiT) -> None:
    for (path, found), expected in zip(jax.tree.leaves_with_path(ours), jax.tree.leaves(theirs), strict=True):
        largest = np.abs(expected).max()
        assert np.abs(np.asarray(found) - expected).max() <= 1e-6 * largest, jax.tree_util.keystr(path)


def named(numbers: Numbers, rename: Callable[[str], str], a: str, b: str, *, alpha: bool) -> dict[str, torch.Tensor]:
    tensors = {}
    for name, (first, second) in numbers.items():
        tensors |= {f"{rename(name)}{a}": first.clone(), f"{rename(name)}{b}": second}
        tensors |= {f"{rename(name)}.alpha": torch.tensor(ALPHA)} if alpha else {}
    return tensors


def stability_numbers(numbers: Numbers) -> Numbers:
    """The same numbers for layers as Stability has them; its last modulation of text has the shift first."""
    found: Numbers = {}
    for name, (a, b) in numbers.items():
        block, module = name.split(".", 2)[1:]
        if module in STABILITY:
            if module == "norm1_context.linear" and len(b) == 2 * a.shape[1]:
                b = torch.cat(b.chunk(2)[::-1])
            found[f"joint_blocks.{block}.{STABILITY[module]}"] = a, b
        for fused, (first, *others) in FUSED.items():
            if module == first:
                parts = [numbers[f"transformer_blocks.{block}.{part}"][1] for part in (first, *others)]
                found[f"joint_blocks.{block}.{fused}"] = a, torch.cat(parts)
    return found


flat = lambda prefix: lambda name: prefix + name.replace(".", "_")
dotted = lambda prefix: lambda name: prefix + name
AB, DOWN_UP = (".lora_A.weight", ".lora_B.weight"), (".lora_down.weight", ".lora_up.weight")
NAMINGS = {
    "diffusers": (False, dotted("transformer."), *AB),
    "PEFT's state of a model": (False, dotted("base_model.model."), ".lora_A.default.weight", ".lora_B.default.weight"),
    "SimpleTuner": (False, dotted("transformer."), ".lora.down.weight", ".lora.up.weight"),
    "save_lora_adapter": (False, dotted(""), *AB),
    "kohya": (True, flat("lora_unet_"), *DOWN_UP),
    "OneTrainer's own": (False, dotted("transformer."), *DOWN_UP),
    "OneTrainer's former": (False, flat("lora_transformer_"), *DOWN_UP),
    "OneTrainer's original": (True, dotted(""), *AB),
    "ComfyUI": (True, dotted("diffusion_model."), *AB),
    "LyCORIS": (False, flat("lycoris_"), *DOWN_UP),
    "LyCORIS of diffusers' layers as kohya's": (False, flat("lora_unet_"), *DOWN_UP),
}


@pytest.mark.parametrize("naming", NAMINGS)
def test_every_naming_gives_the_weights_of_pefts_merge(tmp_path, base, numbers, merged, naming):
    stability, rename, a, b = NAMINGS[naming]
    by_name = stability_numbers(numbers) if stability else numbers
    peft = naming.startswith("PEFT")
    save_file(named(by_name, rename, a, b, alpha=not peft), tmp_path / "lora.safetensors")
    if peft:
        LoraConfig(r=RANK, lora_alpha=ALPHA, target_modules=list(numbers)).save_pretrained(tmp_path)
    assert_same_weights(merge_lora(attach_lora(base, tmp_path / "lora.safetensors")), merged)


def test_a_layer_that_has_no_adapter_in_some_blocks_stays_as_it_is_there(tmp_path, model, base, numbers):
    """Tools that leave out what training did not change write such files; diffusers reads them."""
    absent = ("0.attn.to_q", "2.ff.net.2", "3.norm1_context.linear", "4.attn.to_out.0")
    fewer = {name: pair for name, pair in numbers.items() if not name.endswith(absent)}
    assert len(fewer) == len(numbers) - len(absent)
    save_file(named(fewer, dotted("transformer."), *AB, alpha=True), tmp_path / "lora.safetensors")
    ours = merge_lora(attach_lora(base, tmp_path / "lora.safetensors"))
    assert_same_weights(ours, merged_by_peft(model, fewer, tmp_path))
    for to in ("native", "diffusers"):
        convert_lora(tmp_path / "lora.safetensors", tmp_path / f"{to}.safetensors", to=to)
        assert_same_weights(merge_lora(attach_lora(base, tmp_path / f"{to}.safetensors")), ours)


def test_a_fused_layers_three_adapters_are_its_own_to_the_bit(tmp_path, numbers):
    fused = {name: pair for name, pair in stability_numbers(numbers).items() if name.endswith("x_block.attn.qkv")}
    save_file(named(fused, flat("lora_unet_"), *DOWN_UP, alpha=True), tmp_path / "lora.safetensors")
    read = read_lora(tmp_path / "lora.safetensors")
    assert (read.format, read.config.rank, read.config.alpha) == ("kohya", RANK, ALPHA)
    for block in range(5):
        a, b = fused[f"joint_blocks.{block}.x_block.attn.qkv"]
        ours = [read.adapters[f"blocks.{block}.image.attention.{name}"] for name in "qkv"]
        assert all(np.array_equal(pair.a.T, a) for pair in ours)
        assert np.array_equal(np.concatenate([pair.b.T for pair in ours]), b)


@pytest.mark.parametrize("form", ["peft", "diffusers"])
def test_last_modulations_are_written_as_diffusers_has_them(tmp_path, base, numbers, merged, form):
    source, target = tmp_path / "kohya.safetensors", tmp_path / ("peft" if form == "peft" else "diffusers.safetensors")
    save_file(named(stability_numbers(numbers), flat("lora_unet_"), *DOWN_UP, alpha=True), source)
    convert_lora(source, target, to=form)
    assert_same_weights(merge_lora(attach_lora(base, target)), merged)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_ranks_and_alphas_of_layers_are_their_own(tmp_path, model, base, numbers, dtype):
    """PEFT's patterns, by regular expression and by name, and kohya's alphas say the same."""
    ranks, alphas = {"to_q": 5, r"ff\.net\.\d": 1}, {"^transformer_blocks.1.attn.to_k": 3.0, "net.2": 0.7}
    rank_of = lambda name: 5 if name.endswith(".to_q") else 1 if name.endswith("ff.net.2") else RANK
    alpha_of = lambda name: (
        3.0 if name == "transformer_blocks.1.attn.to_k" else 0.7 if name.endswith("net.2") else ALPHA
    )
    own = {
        name: (
            (torch.cat([a, a + 1])[: rank_of(name)]).to(dtype),
            torch.cat([b, b - 1], 1)[:, : rank_of(name)].to(dtype),
        )
        for name, (a, b) in numbers.items()
    }
    expected = merged_by_peft(model, own, tmp_path, rank_pattern=ranks, alpha_pattern=alphas)
    tensors = named(own, flat("lycoris_"), *DOWN_UP, alpha=False)
    tensors |= {f"{flat('lycoris_')(name)}.alpha": torch.tensor(alpha_of(name)) for name in own}
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, tmp_path / "lora.safetensors")
    assert_same_weights(merge_lora(attach_lora(base, tmp_path / "lora.safetensors")), expected)
    tensors = named(own, dotted("base_model.model."), *AB, alpha=False)
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, tmp_path / "adapter_model.safetensors")
    settings = LoraConfig(r=RANK, lora_alpha=ALPHA, target_modules=list(own), rank_pattern=ranks, alpha_pattern=alphas)
    settings.save_pretrained(tmp_path)
    read = tmp_path / "adapter_model.safetensors"
    assert_same_weights(merge_lora(attach_lora(base, read)), expected)


def test_without_any_alpha_each_layer_is_applied_as_it_is(tmp_path):
    """As diffusers does, whatever the ranks: alpha is the rank."""
    tensors = {f"transformer.{name}": tensor for name, tensor in factors().items()}
    for name in [name for name in tensors if ".to_k." in name]:
        tensors[name] = tensors[name][:2] if ".lora_A" in name else tensors[name][:, :2].contiguous()
    save_file(tensors, tmp_path / "lora.safetensors")
    config, adapters = load_lora(tmp_path / "lora.safetensors")
    assert (config.rank, config.alpha) == (RANK, RANK)
    for block in range(6):
        a, b = (tensors[f"transformer.transformer_blocks.{block}.attn.to_k.lora_{side}.weight"] for side in "AB")
        ours = adapters[f"blocks.{block}.image.attention.k"]
        assert np.array_equal((ours.a @ ours.b).T, (b @ a).numpy()) or np.allclose(
            (ours.a @ ours.b).T, b @ a, atol=1e-6
        )


def kohyas(path: Path, header: str) -> Path:
    """A file without alphas among its tensors."""
    layer = lambda name: "lora_unet_" + name.split(".lora_")[0].replace(".", "_")
    part = lambda name: "lora_down" if ".lora_A." in name else "lora_up"
    tensors = {f"{layer(name)}.{part(name)}.weight": tensor for name, tensor in factors().items()}
    save_file(tensors, path, {"ss_network_alpha": header, "ss_network_dim": str(RANK)})
    return path


@pytest.mark.parametrize(("header", "alpha"), [("8", 8), ("0.5", 0.5), ("0", RANK)])
def test_kohyas_header_says_alpha_where_no_tensor_does(tmp_path, header, alpha):
    """Its trainer takes 0 for the rank."""
    assert load_lora(kohyas(tmp_path / "lora.safetensors", header))[0].alpha == alpha


def test_kohyas_header_says_nothing_of_names_that_diffusers_reads(tmp_path):
    """diffusers applies such a file with each layer's rank as alpha: its scale is in the factors."""
    tensors = {f"transformer.{name}": tensor for name, tensor in factors().items()}
    save_file(tensors, tmp_path / "lora.safetensors", {"ss_network_alpha": "1", "ss_network_dim": str(RANK)})
    assert load_lora(tmp_path / "lora.safetensors")[0].alpha == RANK


def test_of_two_states_in_one_file_none_is_chosen_by_its_place(tmp_path):
    for order in (("ema", "model"), ("model", "ema")):
        torch.save({name: factors() for name in order}, tmp_path / "lora.pt")
        with pytest.raises(
            CheckpointError, match=rf"lora\.pt: there are adapters in {' and '.join(order)}, and nothing"
        ):
            load_lora(tmp_path / "lora.pt")


def test_an_alpha_in_kohyas_header_is_not_overruled(tmp_path):
    with pytest.raises(CheckpointError, match="it says alpha is 8; --alpha 5 is for files that do not say"):
        load_lora(kohyas(tmp_path / "lora.safetensors", "8"), alpha=5.0)


@pytest.mark.parametrize("header", ["None", "", "nan", "-1", "inf"])
def test_an_alpha_in_kohyas_header_that_is_no_number_is_refused(tmp_path, header):
    with pytest.raises(CheckpointError, match="ss_network_alpha in its header: expected a finite positive number"):
        load_lora(kohyas(tmp_path / "lora.safetensors", header))


def test_the_only_file_of_a_directory_is_read_whatever_it_is_called(tmp_path):
    kohyas(tmp_path / "k.safetensors", "8")
    assert load_lora(tmp_path)[1].keys() == load_lora(tmp_path / "k.safetensors")[1].keys()
    kohyas(tmp_path / "l.safetensors", "8")
    with pytest.raises(CheckpointError, match=r"or a single \.safetensors file, in it; name a file"):
        load_lora(tmp_path)


def test_the_folders_that_peft_writes_for_several_names_are_named(tmp_path):
    for name in ("style", "object"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "adapter_config.json").write_text("{}")
    with pytest.raises(CheckpointError, match=r"adapters are in its folders object, style: name one of them"):
        load_lora(tmp_path)


def test_text_encoders_adapters_are_named_and_left_out_only_when_asked(tmp_path, capsys):
    tensors = {f"transformer.{name}": tensor for name, tensor in factors().items()}
    for encoder in ("text_encoder", "text_encoder_2"):
        name = f"{encoder}.text_model.encoder.layers.0.self_attn.q_proj"
        tensors |= {f"{name}.lora_A.weight": torch.zeros(3, 4), f"{name}.lora_B.weight": torch.zeros(4, 3)}
    path = tmp_path / "lora.safetensors"
    save_file(tensors, path)
    with pytest.raises(
        CheckpointError, match=r"would go unused: 2 text_encoder\.\*, 2 text_encoder_2\.\*;.*--adapters-on"
    ):
        load_lora(path)
    assert load_lora(path, adapters_only=True)[1].keys() == read_lora(path).adapters.keys()
    assert main(["lora", str(path), str(tmp_path / "ours.safetensors"), "--adapters-only"]) == 0
    assert "2 text_encoder.*, 2 text_encoder_2.*" in capsys.readouterr().err
    assert not read_lora(tmp_path / "ours.safetensors").others


def test_the_former_attention_processors_names_are_read(tmp_path):
    """diffusers turns them into today's."""
    former = lambda name: (
        name.replace(".to_out.0.", ".to_out.")
        .replace(".attn.to_", ".attn.processor.to_")
        .replace(".lora_A", "_lora.down")
    ).replace(".lora_B", "_lora.up")
    tensors = {f"transformer.{former(name)}": tensor for name, tensor in factors().items()}
    assert "transformer.transformer_blocks.0.attn.processor.to_out_lora.up.weight" in tensors
    save_file(tensors, tmp_path / "former.safetensors")
    save_file({f"transformer.{name}": tensor for name, tensor in factors().items()}, tmp_path / "now.safetensors")
    former_ones, now = (load_lora(tmp_path / f"{name}.safetensors")[1] for name in ("former", "now"))
    assert jax.tree.all(jax.tree.map(np.array_equal, former_ones, now))


@pytest.mark.parametrize("form", ["PEFT", "diffusers", "release"])
def test_files_of_torch_save_are_read_as_safetensors_are(tmp_path, form):
    prefix = {"PEFT": "base_model.model.", "diffusers": "transformer.", "release": ""}[form]
    tensors = {f"{prefix}{name}": tensor for name, tensor in factors().items()}
    if form == "PEFT":
        LoraConfig(r=RANK, lora_alpha=16, target_modules=["to_q", "to_k", "to_v", "to_out.0"]).save_pretrained(tmp_path)
    name = {"PEFT": "adapter_model.bin", "diffusers": "pytorch_lora_weights.bin", "release": "lora.pth"}[form]
    torch.save(release_names(tensors) if form == "release" else tensors, tmp_path / name)
    config, adapters = load_lora(tmp_path / name if form == "release" else tmp_path)
    assert config.alpha == (RANK if form == "diffusers" else 16)
    assert np.array_equal(
        adapters["blocks.2.image.attention.v"].a.T, factors()["transformer_blocks.2.attn.to_v.lora_A.weight"]
    )
