"""What the names of foreign tensors tell is said in one sentence, with the remedy."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from seg4diff_jax.convert.errors import LISTED, CheckpointError
from seg4diff_jax.convert.foreign_names import OF_ADAPTERS, OF_MODELS, recognise
from seg4diff_jax.convert.lora.adapters import load_lora
from seg4diff_jax.convert.sources.open import open_source
from tests.reference.adapters import factors
from tests.reference.checkpoints import make_checkpoint
from tests.reference.damage import edit

Tensors = dict[str, torch.Tensor]
WEIGHTS = "transformer/diffusion_pytorch_model.safetensors"
EMA = {"model_ema.decay": torch.ones(()), "model_ema.diffusion_modelpos_embed": torch.ones(1)}


def prefixed(prefix: str, tensors: Tensors) -> Tensors:
    return {prefix + name: tensor for name, tensor in tensors.items()}


def with_adapters(tensors: Tensors) -> Tensors:
    """As PEFT's layers save themselves."""
    wrapped = lambda name: name.replace(".to_q.", ".to_q.base_layer.") if ".attn.to_q." in name else name
    return {wrapped(name): tensor for name, tensor in tensors.items()} | factors()


def fused(tensors: Tensors) -> Tensors:
    first = "transformer_blocks.0.attn."
    parts = {
        name: tensor for name, tensor in tensors.items() if name.startswith(tuple(f"{first}to_{x}." for x in "qkv"))
    }
    whole = torch.cat([parts[f"{first}to_{x}.weight"] for x in "qkv"])
    return {name: x for name, x in tensors.items() if name not in parts} | {f"{first}to_qkv.weight": whole}


def within(wrapper: str, tensors: Tensors) -> Tensors:
    return {name.replace(".attn.", f".{wrapper}.attn."): tensor for name, tensor in tensors.items()}


def named(*names: str) -> Tensors:
    return {name: torch.ones(4, 4) for name in names}


OTHERS = {
    "SD 1.5's and SDXL's": (
        named("model.diffusion_model.input_blocks.0.0.weight", "conditioner.embedders.0.transformer.a.weight"),
        "a U-Net with its text encoders, as of Stable Diffusion 1.5, 2 and XL: expected Stable Diffusion 3 or 3.5",
    ),
    "SDXL's of diffusers": (named("down_blocks.1.attentions.0.transformer_blocks.0.attn1.to_q.weight"), "a U-Net with"),
    "FLUX's": (named("double_blocks.0.img_attn.qkv.weight", "single_blocks.0.linear1.weight"), "FLUX's transformer"),
    "FLUX's, prefixed": (named("model.diffusion_model.double_blocks.0.img_attn.qkv.weight"), "FLUX's transformer"),
    "FLUX's of diffusers": (
        named("transformer_blocks.0.attn.to_q.weight", "single_transformer_blocks.0.attn.to_q.weight"),
        "FLUX's transformer",
    ),
    "a ControlNet's": (named("transformer_blocks.0.attn.to_q.weight", "controlnet_blocks.0.weight"), "a ControlNet"),
    "an IP-Adapter's": (named("image_proj.proj.weight", "ip_adapter.1.to_k_ip.weight"), "an IP-Adapter"),
    "Wan's": (named("blocks.0.self_attn.q.weight", "blocks.0.cross_attn.q.weight"), "another diffusion transformer"),
    "Lumina's": (named("layers.0.attention.qkv.weight", "layers.0.feed_forward.w1.weight"), "another diffusion trans"),
    "HiDream's": (named("double_stream_blocks.0.block.attn1.to_q.weight"), "another diffusion transformer"),
    "PixArt's": (named("transformer_blocks.0.attn1.to_q.weight", "adaln_single.linear.weight"), "another diffusion tr"),
}
"""Files of other families, under a few of their names."""
MODELS = {
    "torch.compile": (lambda tensors: prefixed("_orig_mod.", tensors), "model._orig_mod"),
    "compiled blocks": (lambda tensors: within("_orig_mod", tensors), "compile_repeated_blocks()"),
    "sharded": (lambda tensors: within("_fsdp_wrapped_module", tensors), "full_state_dict=True"),
    "checkpointed": (lambda tensors: within("_checkpoint_wrapped_module", tensors), "PyTorch's `checkpoint_wrapper`"),
    "data parallel": (lambda tensors: prefixed("module.", tensors), "model.module"),
    "average alone": (lambda tensors: prefixed("ema.", tensors), "moving average"),
    "both": (lambda tensors: prefixed("module._orig_mod.", tensors), "model._orig_mod"),
    "average": (lambda tensors: tensors | EMA, "moving average"),
    "adapters inside": (with_adapters, "unload_lora_weights()"),
    "adapters beside": (lambda tensors: tensors | factors(), "adapters are read with `--lora`"),
    "fused projections": (fused, "unfuse_qkv_projections()"),
    "another prefix": (
        lambda tensors: prefixed("pipeline.transformer.", tensors),
        "begin with `pipeline.transformer.`",
    ),
}
SDXL = "{}down_blocks{}1{}attentions.0.transformer_blocks.0.attn1.to_q.lora_down.weight"
STATE = {"transformer_blocks.0.attn.to_q.base_layer.weight": torch.ones(4, 4)}
CLIP = {"text_model.encoder.layers.0.mlp.fc1.lora_A.weight": torch.ones(2, 2)}
T5 = {"lora_te3_encoder_block_0_layer_0_SelfAttention_q.lora_down.weight": torch.ones(2, 2)}
ADAPTERS = {
    "compiled blocks": (prefixed("transformer.", within("_orig_mod", factors())), "compile_repeated_blocks()"),
    "kohya's compiled": (named("lora_unet__orig_mod_joint_blocks_0_x_block_attn_qkv.lora_down.weight"), "._orig_mod`"),
    "sharded": (within("_fsdp_wrapped_module", factors()), "full_state_dict=True"),
    "checkpointed": (within("_checkpoint_wrapped_module", factors()), "PyTorch's `checkpoint_wrapper`"),
    "SDXL's of kohya": (
        named("lora_te1_text_model_encoder_layers_0_mlp_fc1.lora_down.weight", SDXL.format("lora_unet_", "_", "_")),
        "a U-Net with",
    ),
    "SD 1.5's of diffusers": (named(SDXL.format("unet.", ".", ".")), "a U-Net with"),
    "FLUX's of diffusers": (
        named("transformer.single_transformer_blocks.0.attn.to_q.lora_A.weight") | prefixed("transformer.", factors()),
        "FLUX's transformer",
    ),
    "FLUX's of kohya": (named("lora_unet_double_blocks_0_img_attn_qkv.lora_down.weight"), "FLUX's transformer"),
    "a ControlNet's": (named("controlnet_blocks.0.lora_A.weight"), "a ControlNet"),
    "an IP-Adapter's": (named("ip_adapter.1.to_k_lora.down.weight"), "an IP-Adapter"),
    "SDXL's of LyCORIS": (named("lycoris_down_blocks_1_attentions_0_proj_in.lora_down.weight"), "a U-Net with"),
    "Wan's": (named("diffusion_model.blocks.0.self_attn.q.lora_A.weight"), "another diffusion transformer"),
    "Wan's of kohya": (named("lora_unet_blocks_0_self_attn_q.lora_down.weight"), "another diffusion transformer"),
    "Qwen-Image's other": (named("transformer.transformer_blocks.0.img_mlp.net.2.lora_A.weight"), "another diffusion"),
    "Qwen-Image's": (
        named("transformer.transformer_blocks.0.img_mod.1.lora_A.weight"),
        "another diffusion transformer",
    ),
    "torch.compile": (prefixed("_orig_mod.", factors()), "model._orig_mod"),
    "below the prefix": (prefixed("transformer._orig_mod.", factors()), "model._orig_mod"),
    "data parallel": (prefixed("module.", factors()), "model.module"),
    "a whole state": (STATE | factors(), "save them alone"),
    "CLIP's": (prefixed("text_encoder.", CLIP), "of a text encoder"),
    "CLIP's of PEFT": (prefixed("base_model.model.", CLIP), "of a text encoder"),
    "T5's of kohya": (T5, "of a text encoder"),
}


@pytest.fixture(scope="module")
def sound(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_checkpoint(tmp_path_factory.mktemp("sound") / "sd3")


def said(source: Path) -> str:
    check = lambda: open_source(source, components=["transformer"]).component("transformer").check()
    with pytest.raises(CheckpointError) as caught:
        check()
    return str(caught.value)


@pytest.mark.parametrize("form", MODELS)
def test_a_foreign_state_is_told_in_one_sentence_with_the_remedy(sound: Path, tmp_path: Path, form: str):
    change, remedy = MODELS[form]
    tensors = change(load_file(sound / WEIGHTS))
    for name in ("model_index.json", "transformer/config.json"):
        (tmp_path / "sd3" / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(sound / name, tmp_path / "sd3" / name)
    shutil.copytree(sound / "scheduler", tmp_path / "sd3/scheduler")
    for file in (tmp_path / "single.safetensors", tmp_path / "sd3" / WEIGHTS):
        save_file(tensors, file)
    for source, place in ((tmp_path / "single.safetensors",) * 2, (tmp_path / "sd3", tmp_path / "sd3/transformer")):
        message = said(source)
        assert str(place) in message
        assert remedy in message
        assert "\n" not in message
        assert len(message.replace(str(place), "")) < 400


@pytest.mark.parametrize("form", OTHERS)
def test_a_single_file_of_another_family_is_told_as_what_it_is(tmp_path: Path, form: str):
    tensors, kind = OTHERS[form]
    save_file(tensors, tmp_path / "other.safetensors")
    message = said(tmp_path / "other.safetensors")
    assert message.startswith(f"{tmp_path / 'other.safetensors'}: ")
    assert kind in message
    assert "\n" not in message


@pytest.mark.parametrize("form", ADAPTERS)
def test_adapters_from_elsewhere_are_told_the_same_way(tmp_path: Path, form: str):
    tensors, remedy = ADAPTERS[form]
    save_file(tensors, tmp_path / "lora.safetensors")
    (tmp_path / "adapter_config.json").write_text("{}")
    with pytest.raises(CheckpointError) as caught:
        load_lora(tmp_path / "lora.safetensors")
    message = str(caught.value)
    assert message.startswith(f"{tmp_path / 'lora.safetensors'}: ")
    assert remedy in message
    assert "\n" not in message
    assert len(message.replace(str(tmp_path), "")) < 400


@pytest.mark.parametrize(
    "form",
    [prefixed("transformer.", factors()), factors(), named("lora_unet_joint_blocks_0_x_block_mlp_fc1.lora_up.weight")],
)
def test_adapters_in_a_models_place_are_told_as_such(tmp_path: Path, form: Tensors):
    for rename in (str, lambda name: name.replace("lora_A", "lora_down").replace("lora_B", "lora_up")):
        save_file({rename(name): tensor for name, tensor in form.items()}, tmp_path / "lora.safetensors")
        assert "adapters are read with `--lora`" in said(tmp_path / "lora.safetensors")


def test_a_model_in_adapters_place_is_told_as_such(sound: Path, tmp_path: Path):
    whole = prefixed("model.diffusion_model.", named("joint_blocks.0.x_block.attn.qkv.weight"))
    te = named("text_encoders.clip_l.transformer.text_model.encoder.layers.0.mlp.fc1.weight")
    save_file(whole | te, tmp_path / "single.safetensors")
    for file in (tmp_path / "single.safetensors", sound / WEIGHTS, sound / "text_encoder/model.safetensors"):
        with pytest.raises(CheckpointError, match=r"a model's own weights .*, and no adapters: give it as the model"):
            load_lora(file)


def test_leftovers_of_another_family_do_not_rename_a_sound_model(sound: Path, tmp_path: Path):
    single = prefixed("model.diffusion_model.", named("joint_blocks.0.x_block.attn.qkv.weight"))
    save_file(single | named("conditioner.embedders.0.a.weight"), tmp_path / "single.safetensors")
    assert "1 surplus tensors of no component:\n  conditioner.embedders.0.a.weight" in said(
        tmp_path / "single.safetensors"
    )


def test_what_names_tell_goes_before_settings_that_lack(tmp_path: Path):
    save_file(prefixed("base_model.model.", STATE | factors()), tmp_path / "model.safetensors")
    with pytest.raises(CheckpointError, match="a whole model's state with adapters in it"):
        load_lora(tmp_path / "model.safetensors")


def test_every_row_has_a_case():
    for rows, cases in ((OF_MODELS, MODELS | OTHERS), (OF_ADAPTERS, ADAPTERS)):
        for sentence in rows.values():
            assert any(remedy in sentence for _, remedy in cases.values()), sentence


def test_names_that_tell_nothing_are_listed_up_to_a_bound(sound: Path, tmp_path: Path):
    assert recognise(load_file(sound / WEIGHTS)) is None
    source = Path(shutil.copytree(sound, tmp_path / "sd3"))
    edit(source / WEIGHTS, lambda tensors: tensors.update({f"odd.{i}": torch.ones(1) for i in range(LISTED + 3)}))
    message = said(source)
    assert f"({LISTED + 3} problems)" in message
    assert message.endswith("and 3 more")
    assert message.count("surplus tensor odd.") == LISTED


def test_tensors_of_no_component_are_listed_up_to_the_same_bound(sound: Path, tmp_path: Path):
    prefix = "model.diffusion_model."
    odd = {f"odd.{i}": torch.ones(1) for i in range(LISTED + 3)}
    save_file(prefixed(prefix, load_file(sound / WEIGHTS)) | odd, tmp_path / "single.safetensors")
    message = said(tmp_path / "single.safetensors")
    assert f"{LISTED + 3} surplus tensors of no component" in message
    assert message.endswith("and 3 more")


def test_two_adapters_in_one_file_are_one_problem(tmp_path: Path):
    twice = [{name.replace(".weight", f".{one}.weight"): x for name, x in factors().items()} for one in "ab"]
    save_file({name: x.clone() for name, x in (twice[0] | twice[1]).items()}, tmp_path / "lora.safetensors")
    with pytest.raises(
        CheckpointError, match=r"\(1 problem\)(?s:.*)A as .*: of two adapters in one file save one alone"
    ):
        load_lora(tmp_path / "lora.safetensors")
