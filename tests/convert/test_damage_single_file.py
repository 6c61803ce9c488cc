"""Single files that are no SD3, or not whole, stop a conversion before anything is written."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from seg4diff_jax.convert.errors import CheckpointError
from seg4diff_jax.convert.sources.open import open_source
from tests.reference.checkpoints import make_checkpoint
from tests.reference.damage import edit, refusal
from tests.reference.single_file import make_both
from tests.reference.weight_files import random_tensors, write_plain


def test_a_missing_tensor_of_a_single_file_has_its_whole_name_and_is_told_once_though_it_fills_three(tmp_path: Path):
    layout, single = make_both(tmp_path, dual=False)
    lost = "model.diffusion_model.joint_blocks.1.x_block.attn.qkv.weight"
    edit(single, lambda state: (state.pop(lost), state.pop("first_stage_model.decoder.conv_out.bias")))
    message = refusal(single, tokenizers=layout)
    assert message.count("missing tensor") == 2
    assert f"missing tensor {lost} [384, 128]" in message
    assert "missing tensor first_stage_model.decoder.conv_out.bias [3]" in message


def test_a_single_file_may_lie_beside_a_diffusers_checkpoint(tmp_path: Path):
    checkpoint = make_checkpoint(tmp_path / "sd3")
    save_file({"model.diffusion_model.pos_embed": torch.zeros(1, 4, 8)}, checkpoint / "sd3.safetensors")
    with pytest.raises(CheckpointError, match=r"transformer: missing tensor model\.diffusion_model\.context_em"):
        open_source(checkpoint / "sd3.safetensors")


def test_a_pickled_single_file_is_refused_unread(tmp_path: Path):
    (tmp_path / "sd3.ckpt").write_bytes(b"\x80\x02")
    assert "sd3.ckpt: a file of torch.save: pickled files can run code" in refusal(tmp_path / "sd3.ckpt")


def test_a_single_file_of_another_model_is_refused(tmp_path: Path):
    save_file({"model.layers.0.weight": torch.zeros(2)}, tmp_path / "llama.safetensors")
    assert "not an SD3 checkpoint" in refusal(tmp_path / "llama.safetensors")


def test_a_single_file_with_tensors_of_no_component_lists_them(tmp_path: Path):
    save_file(
        {"model.diffusion_model.pos_embed": torch.zeros(1, 4, 8), "control.weight": torch.zeros(2)},
        tmp_path / "sd3.safetensors",
    )
    assert "surplus tensors of no component:\n  control.weight" in refusal(tmp_path / "sd3.safetensors")


def test_a_single_file_lacking_what_tells_its_size_names_the_tensor(tmp_path: Path):
    save_file({"model.diffusion_model.pos_embed": torch.zeros(1, 4, 8)}, tmp_path / "sd3.safetensors")
    assert "transformer: missing tensor model.diffusion_model.context_embedder.weight" in refusal(
        tmp_path / "sd3.safetensors"
    )


@pytest.mark.parametrize("number", ["999999999", "9" * 5000])
def test_a_billion_layers_in_a_name_are_answered_at_once_with_that_tensor(tmp_path: Path, number: str):
    tensors = random_tensors("transformer", "stability")
    name = f"joint_blocks.{number}.x_block.attn.ln_q.weight"
    tensors[name] = np.ones(64, np.float32)
    source = open_source(write_plain(tmp_path / "sd3.safetensors", tensors))
    with pytest.raises(CheckpointError, match=f"surplus tensor {name}") as caught:
        source.component("transformer").check()
    assert "(1 problems)" in str(caught.value)


@pytest.mark.parametrize("shape", [(), (4,), (0, 16, 0, 0), (256, 16, 2, 2, 1)])
def test_a_shape_from_which_no_size_follows_is_named(tmp_path: Path, shape: tuple[int, ...]):
    tensors = random_tensors("transformer", "stability") | {"x_embedder.proj.weight": np.zeros(shape, np.float32)}
    with pytest.raises(CheckpointError, match=r"sd3\.safetensors: transformer: no configuration .* x_embedder\.proj"):
        open_source(write_plain(tmp_path / "sd3.safetensors", tensors))
