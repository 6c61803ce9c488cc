"""A checkpoint goes from diffusers to our format and back without a bit changed, and from a single file likewise."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest
import torch
from diffusers import AutoencoderKL, StableDiffusion3Pipeline
from diffusers.loaders.single_file_utils import (
    convert_ldm_vae_checkpoint,
    convert_sd3_transformer_checkpoint_to_diffusers,
)
from flax import nnx
from safetensors.torch import load_file

from seg4diff_jax.convert.__main__ import main
from seg4diff_jax.convert.assemble import abstract, from_state_dict
from seg4diff_jax.convert.checkpoint import convert_checkpoint
from seg4diff_jax.convert.components import COMPONENTS, expert_block, parse_config
from seg4diff_jax.convert.errors import CheckpointError
from seg4diff_jax.convert.load import load_component
from seg4diff_jax.convert.sources.open import open_source
from tests.reference.checkpoints import make_checkpoint
from tests.reference.single_file import make_both


@pytest.fixture(scope="module")
def original(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """SD3 with T5, fp16, transformer and T5 in several shards."""
    return make_checkpoint(tmp_path_factory.mktemp("sd3") / "diffusers", dtype=torch.float16, max_shard_size="500KB")


@pytest.fixture(scope="module")
def converted(original: Path) -> Path:
    convert_checkpoint(original, original.parent / "native")
    return original.parent / "native"


def state_dict(folder: Path) -> dict[str, torch.Tensor]:
    return {name: tensor for file in sorted(folder.glob("*.safetensors")) for name, tensor in load_file(file).items()}


def assert_same_tensors(
    found: Path, expected: Path, cast: Callable[[torch.Tensor], torch.Tensor] = lambda x: x
) -> None:
    ours, theirs = state_dict(found), state_dict(expected)
    assert ours.keys() == theirs.keys()
    for name, tensor in theirs.items():
        wanted = cast(tensor)
        assert ours[name].dtype == wanted.dtype, name
        assert torch.equal(ours[name].view(torch.uint8), wanted.contiguous().view(torch.uint8)), name


def manifest(directory: Path) -> dict:
    return json.loads((directory / "manifest.json").read_text())


def parameter_files(directory: Path) -> dict[str, bytes]:
    names = (path.relative_to(directory) for path in directory.rglob("params/*/*/*") if path.name[0].isdigit())
    return {str(name): (directory / name).read_bytes() for name in names}


def test_diffusers_to_ours_and_back_keeps_every_bit_and_configuration(original: Path, converted: Path, tmp_path: Path):
    convert_checkpoint(converted, tmp_path / "back", to="diffusers")
    for name in COMPONENTS:
        assert_same_tensors(tmp_path / "back" / name, original / name)
        configs = [
            json.loads((directory / name / "config.json").read_text()) for directory in (original, tmp_path / "back")
        ]
        assert configs[0] == configs[1]
    for folder in ("tokenizer", "tokenizer_2", "tokenizer_3"):
        files = {path.name: path.read_bytes() for path in (original / folder).iterdir()}
        assert files == {path.name: path.read_bytes() for path in (tmp_path / "back" / folder).iterdir()}
    pipeline = StableDiffusion3Pipeline.from_pretrained(tmp_path / "back", torch_dtype=torch.float16)
    assert_same_state(pipeline.transformer, original / "transformer")
    assert_same_state(pipeline.text_encoder_2, original / "text_encoder_2")


def assert_same_state(module: torch.nn.Module, folder: Path) -> None:
    state = module.state_dict()
    assert all(torch.equal(state[name], tensor) for name, tensor in state_dict(folder).items())


def test_the_diffusers_pipeline_loads_what_is_written_back_without_t5(converted: Path, tmp_path: Path):
    parts = ["transformer", "vae", "text_encoder", "text_encoder_2"]
    convert_checkpoint(converted, tmp_path / "back", to="diffusers", components=parts)
    pipeline = StableDiffusion3Pipeline.from_pretrained(tmp_path / "back", text_encoder_3=None, tokenizer_3=None)
    assert pipeline.text_encoder_3 is None
    assert not (tmp_path / "back" / "tokenizer_3").exists()


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_a_dtype_is_rounded_to_as_pytorch_rounds(original: Path, tmp_path: Path, dtype: str):
    convert_checkpoint(original, tmp_path / "native", dtype=dtype, components=["transformer", "text_encoder"])
    convert_checkpoint(tmp_path / "native", tmp_path / "back", to="diffusers")
    for name in ("transformer", "text_encoder"):
        assert_same_tensors(tmp_path / "back" / name, original / name, lambda x: x.to(getattr(torch, dtype)))


def test_eight_bit_floats_are_widened_without_loss(original: Path, tmp_path: Path):
    state = {name: tensor.to(torch.float8_e4m3fn) for name, tensor in state_dict(original / "vae").items()}
    directory = copy_with(original, tmp_path / "fp8", "vae", state)
    convert_checkpoint(directory, tmp_path / "native", components=["vae"])
    convert_checkpoint(tmp_path / "native", tmp_path / "back", to="diffusers")
    assert_same_tensors(tmp_path / "back" / "vae", directory / "vae", lambda x: x.to(torch.bfloat16))


def test_a_component_of_mixed_dtypes_keeps_each_tensors_own(original: Path, tmp_path: Path):
    state = state_dict(original / "text_encoder_3")
    state = {name: tensor.float() if name.endswith("wo.weight") else tensor for name, tensor in state.items()}
    directory = copy_with(original, tmp_path / "mixed", "text_encoder_3", state)
    convert_checkpoint(directory, tmp_path / "native", components=["text_encoder_3"])
    convert_checkpoint(tmp_path / "native", tmp_path / "back", to="diffusers")
    assert_same_tensors(tmp_path / "back" / "text_encoder_3", directory / "text_encoder_3")


def copy_with(original: Path, directory: Path, component: str, state: dict[str, torch.Tensor]) -> Path:
    """A checkpoint that shares all files of `original` but one component's weights."""
    from safetensors.torch import save_file

    directory.mkdir()
    for path in original.iterdir():
        if path.name != component:
            (directory / path.name).symlink_to(path)
    (directory / component).mkdir()
    (directory / component / "config.json").write_bytes((original / component / "config.json").read_bytes())
    save_file(state, directory / component / f"{COMPONENTS[component].weights}.safetensors", {"format": "pt"})
    return directory


@pytest.fixture(scope="module", params=["sd3", "sd3.5-medium"])
def both(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    return make_both(tmp_path_factory.mktemp(request.param), dual=request.param != "sd3")


def test_single_file_and_diffusers_layout_convert_to_identical_bytes(both: tuple[Path, Path], tmp_path: Path):
    layout, single = both
    convert_checkpoint(layout, tmp_path / "from_layout")
    convert_checkpoint(single, tmp_path / "from_single", tokenizers=layout)
    found = [manifest(tmp_path / name) for name in ("from_layout", "from_single")]
    assert found[0]["components"] == found[1]["components"]
    files = [parameter_files(tmp_path / name) for name in ("from_layout", "from_single")]
    assert len(files[0]) > 200
    assert files[0] == files[1]
    assert found[0]["expert_block"] == found[1]["expert_block"]
    assert found[0]["trained_size"] == found[1]["trained_size"] == 1024


def test_configurations_inferred_from_shapes_are_those_of_the_layout(both: tuple[Path, Path]):
    layout, single = both
    inferred = open_source(single).configs
    assert inferred.keys() == COMPONENTS.keys()
    for name, config in open_source(layout).configs.items():
        assert parse_config(name, inferred[name]) == parse_config(name, config)


def test_diffusers_own_conversion_of_the_single_file_agrees(both: tuple[Path, Path]):
    layout, single = both
    tensors = load_file(single)
    vae = AutoencoderKL.from_pretrained(layout / "vae")
    theirs = {
        "transformer": convert_sd3_transformer_checkpoint_to_diffusers(
            {name: tensor for name, tensor in tensors.items() if name.startswith("model.diffusion_model.")}
        ),
        "vae": convert_ldm_vae_checkpoint(tensors, vae.config),
    }
    for name, state in theirs.items():
        expected = state_dict(layout / name)
        assert state.keys() == expected.keys()
        assert all(torch.equal(state[key].reshape(tensor.shape), tensor) for key, tensor in expected.items())


def test_a_single_file_goes_straight_to_diffusers(both: tuple[Path, Path], tmp_path: Path):
    layout, single = both
    convert_checkpoint(single, tmp_path / "back", to="diffusers", tokenizers=layout)
    for name in COMPONENTS:
        assert_same_tensors(tmp_path / "back" / name, layout / name)
    StableDiffusion3Pipeline.from_pretrained(tmp_path / "back", torch_dtype=torch.float16)


def test_every_source_loads_to_the_same_model(both: tuple[Path, Path], tmp_path: Path):
    layout, single = both
    convert_checkpoint(layout, tmp_path / "native")
    for name, component in COMPONENTS.items():
        config = parse_config(name, open_source(layout).configs[name])
        state = {key: tensor.float().numpy() for key, tensor in state_dict(layout / name).items()}
        model = abstract(lambda rngs: component.model(config, rngs=rngs))  # noqa: B023 - called at once
        expected = nnx.to_pure_dict(nnx.state(from_state_dict(model, component.rules["diffusers"](config), state)))
        for source in (layout, single, tmp_path / "native"):
            found = load_component(source, name, dtype=jnp.float32)
            assert_same_tree(nnx.to_pure_dict(nnx.state(found)), expected)


def assert_same_tree(found, expected) -> None:
    import jax

    assert jax.tree.structure(found) == jax.tree.structure(expected)
    for (path, ours), theirs in zip(jax.tree.leaves_with_path(found), jax.tree.leaves(expected), strict=True):
        np.testing.assert_array_equal(ours, theirs, err_msg=jax.tree_util.keystr(path))


def test_the_expert_block_is_nine_for_both_mediums_alone_and_what_a_configuration_says():
    medium = {"num_layers": 24, "num_attention_heads": 24, "caption_projection_dim": 1536, "pos_embed_max_size": 192}
    assert expert_block(medium) == 9
    newer = medium | {"dual_attention_layers": list(range(13)), "qk_norm": "rms_norm"}
    assert expert_block(newer) == 9
    assert expert_block(newer | {"dual_attention_layers": list(range(12))}) is None
    large = {"num_layers": 38, "num_attention_heads": 38, "caption_projection_dim": 2432, "qk_norm": "rms_norm"}
    assert expert_block(medium | large) is None
    assert expert_block(medium | {"qk_norm": "rms_norm"}) is None
    assert expert_block(medium | {"num_layers": 38}) is None
    assert expert_block(medium | {"expert_block": 4}) == 4
    assert expert_block(medium | {"expert_block": None}) is None


def test_a_stored_expert_block_survives_conversion(original: Path, tmp_path: Path):
    directory = copy_with(original, tmp_path / "with", "transformer", state_dict(original / "transformer"))
    path = directory / "transformer" / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"expert_block": 3}))
    convert_checkpoint(directory, tmp_path / "native", components=["transformer"])
    assert manifest(tmp_path / "native")["expert_block"] == 3
    assert open_source(tmp_path / "native").expert_block == 3
    assert open_source(original).expert_block is None


def test_the_command_converts_there_and_back(original: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    there, back = str(tmp_path / "native"), str(tmp_path / "back")
    arguments = ["--components", "vae", "text_encoder", "--dtype", "bfloat16"]
    assert main(["checkpoint", str(original), there, *arguments]) == 0
    assert main(["checkpoint", there, back, "--to", "diffusers"]) == 0
    assert sorted(path.name for path in Path(back).iterdir() if path.is_dir()) == [
        "scheduler", "text_encoder", "tokenizer", "vae",
    ]  # fmt: skip
    assert main(["checkpoint", str(original), there]) == 1
    assert "exists: choose another name, or give --overwrite" in capsys.readouterr().err
    assert main(["checkpoint", str(original), there, "--components", "vae", "--overwrite"]) == 0
    assert list(manifest(Path(there))["components"]) == ["vae"]


def test_a_single_file_without_tokenizers_says_what_to_give(both: tuple[Path, Path], tmp_path: Path):
    with pytest.raises(CheckpointError, match="without tokenizer, tokenizer_2, tokenizer_3: name a directory"):
        convert_checkpoint(both[1], tmp_path / "native")
    assert not (tmp_path / "native").exists()
