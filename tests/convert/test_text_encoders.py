"""A checkpoint without text encoders is completed from another, of any form, and the message says how."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from diffusers import StableDiffusion3Pipeline
from gguf.constants import MODEL_ARCH
from gguf.tensor_mapping import get_tensor_name_map
from safetensors.torch import load_file, save_file

from seg4diff_jax.convert.__main__ import main
from seg4diff_jax.convert.checkpoint import convert_checkpoint
from seg4diff_jax.convert.components import COMPONENTS, parse_config
from seg4diff_jax.convert.errors import CheckpointError
from seg4diff_jax.convert.sources.open import open_source
from seg4diff_jax.convert.sources.text_encoders import FILES
from seg4diff_jax.convert.verify.report import verify
from seg4diff_jax.convert.verify.torch_side import tensors_of
from tests.reference.checkpoints import make_checkpoint
from tests.reference.single_file import make_both
from tests.reference.weight_files import write_gguf

WITHOUT = ["transformer", "vae"]


@pytest.fixture(scope="module")
def forms(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """One checkpoint in all forms, and `bare` as Stability's sd3.5 files are, without text encoders."""
    directory = tmp_path_factory.mktemp("forms")
    layout, single = make_both(directory, dual=True)
    tensors = load_file(single)
    save_file({n: t for n, t in tensors.items() if not n.startswith("text_enc")}, directory / "bare.safetensors")
    (directory / "clone" / "text_encoders").mkdir(parents=True)
    for name in ("text_encoder", "text_encoder_2", "text_encoder_3"):
        stem, prefix = FILES[name], COMPONENTS[name].prefix
        own = {n.removeprefix(prefix): t for n, t in tensors.items() if n.startswith(prefix)}
        suffix = "_fp16" if stem == "t5xxl" else ""
        save_file(own, directory / "clone" / "text_encoders" / f"{stem}{suffix}.safetensors")
    convert_checkpoint(layout, directory / "native")
    return {
        "diffusers": layout,
        "single file": single,
        "converted": directory / "native",
        "separate files": directory / "clone" / "text_encoders",
        "clone with separate files": directory / "clone",
        "bare": directory / "bare.safetensors",
    }


def components(directory: Path) -> dict:
    return json.loads((directory / "manifest.json").read_text())["components"]


@pytest.mark.parametrize(
    "form", ["diffusers", "single file", "converted", "separate files", "clone with separate files"]
)
def test_text_encoders_of_every_form_complete_a_single_file(forms: dict[str, Path], tmp_path: Path, form: str):
    convert_checkpoint(forms["bare"], tmp_path / "whole", text_encoders=forms[form], tokenizers=forms["diffusers"])
    assert components(tmp_path / "whole") == components(forms["converted"])  # checksums of every parameter among it


@pytest.mark.parametrize("form", ["diffusers", "converted"])
def test_tokenizers_come_along(forms: dict[str, Path], form: str):
    source = open_source(forms["bare"], text_encoders=forms[form])
    assert source.tokenizers == {name: forms[form] / name for name in ("tokenizer", "tokenizer_2", "tokenizer_3")}
    assert list(source.configs) == list(COMPONENTS)
    source = open_source(forms["bare"], components=[*WITHOUT, "text_encoder"], text_encoders=forms[form])
    assert list(source.tokenizers) == ["tokenizer"]
    assert list(source.configs) == [*WITHOUT, "text_encoder"]


def test_a_converted_directory_without_text_encoders_is_completed_and_diffusers_loads_it(
    forms: dict[str, Path], tmp_path: Path
):
    convert_checkpoint(forms["bare"], tmp_path / "bare")
    assert list(components(tmp_path / "bare")) == WITHOUT
    convert_checkpoint(tmp_path / "bare", tmp_path / "whole", to="diffusers", text_encoders=forms["diffusers"])
    pipeline = StableDiffusion3Pipeline.from_pretrained(tmp_path / "whole", torch_dtype=torch.float16)
    expected = load_file(forms["diffusers"] / "text_encoder_2" / "model.safetensors")
    state = pipeline.text_encoder_2.state_dict()
    assert all(torch.equal(state[name], tensor) for name, tensor in expected.items())


def test_text_encoders_that_would_go_unused_are_refused(forms: dict[str, Path], tmp_path: Path):
    with pytest.raises(CheckpointError, match="has all the text encoders that are wanted: leave out text_encoders="):
        open_source(forms["diffusers"], text_encoders=forms["converted"])
    with pytest.raises(CheckpointError, match="leave out text_encoders="):
        open_source(forms["bare"], components=WITHOUT, text_encoders=forms["diffusers"])
    with pytest.raises(CheckpointError, match="leave out text_encoders="):
        verify(forms["diffusers"], text_encoders=forms["separate files"])


def test_a_source_keeps_its_own_text_encoders(tmp_path: Path):
    first = make_checkpoint(tmp_path / "first", t5=False)
    other = make_checkpoint(tmp_path / "other", seed=7)
    source = open_source(first, text_encoders=other)
    own = open_source(first)
    assert {name: source.configs[name] for name in own.configs} == own.configs
    assert source.tokenizers["tokenizer"] == first / "tokenizer"
    assert source.tokenizers["tokenizer_3"] == other / "tokenizer_3"


@pytest.mark.parametrize("form", ["single file", "converted"])
def test_text_encoders_that_are_wanted_and_absent_are_answered_with_the_remedy(
    forms: dict[str, Path], tmp_path: Path, form: str
):
    source = forms["bare"]
    if form == "converted":
        convert_checkpoint(source, tmp_path / "bare")
        source = tmp_path / "bare"
    with pytest.raises(CheckpointError) as caught:
        open_source(source, components=[*WITHOUT, "text_encoder", "text_encoder_2"])
    message = str(caught.value)
    assert f"{source} has no text_encoder, text_encoder_2. Stability's sd3_medium.safetensors and sd3.5_" in message
    assert "as text_encoders=DIR (--text-encoders DIR in commands), or convert once" in message
    assert f"`seg4diff convert checkpoint {source} DST --text-encoders DIR`; " in message
    assert "DIR is a diffusers directory, " in message


def test_a_second_source_that_lacks_them_too_is_named(forms: dict[str, Path]):
    with pytest.raises(CheckpointError, match=r"bare\.safetensors has no text_encoder, text_encoder_2, text_encoder_3"):
        open_source(forms["bare"], text_encoders=forms["bare"])


def test_text_encoders_that_do_not_fit_the_transformer_are_refused(forms: dict[str, Path], tmp_path: Path):
    other = make_checkpoint(tmp_path / "other")
    with pytest.raises(CheckpointError, match=r"pooled states are 56 wide together, the transformer of .* takes 192"):
        open_source(forms["bare"], text_encoders=other)


@pytest.mark.parametrize(
    ("component", "changed", "message"),
    [
        ("transformer", {"in_channels": 33}, "takes 33 channels and gives 16, as for inpainting; expected SD3"),
        ("transformer", {"pooled_projection_dim": 200}, "pooled states are 192 wide together, the .* takes 200$"),
        ("transformer", {"joint_attention_dim": 128}, "CLIPs' states are 192 wide together, .* at most 128"),
        ("transformer", {"joint_attention_dim": 256}, "T5's states are 192 wide, the transformer of .* takes 256"),
        ("vae", {"latent_channels": 4}, "the VAE's latents have 4 channels, the transformer of .* takes 16"),
        ("vae", {"in_channels": 4}, "the VAE takes pictures of 4 channels and gives 3; expected 3"),
    ],
)
def test_components_of_one_checkpoint_have_to_fit_each_other(
    forms: dict[str, Path], tmp_path: Path, component: str, changed: dict[str, int], message: str
):
    layout = Path(shutil.copytree(forms["diffusers"], tmp_path / "layout"))
    config = layout / component / "config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {"out_channels": 16} | changed))
    if component == "vae":
        config.write_text(json.dumps(json.loads(config.read_text()) | {"out_channels": 3}))
    for refused in (lambda: convert_checkpoint(layout, tmp_path / "converted"), lambda: verify(layout)):
        with pytest.raises(CheckpointError, match=message):
            refused()
    open_source(layout, components=["text_encoder", "text_encoder_2"])  # and only what is wanted has to fit


def test_of_several_t5_files_the_variant_decides_and_then_fp16(forms: dict[str, Path], tmp_path: Path):
    folder = Path(shutil.copytree(forms["separate files"], tmp_path / "files"))
    t5 = load_file(folder / "t5xxl_fp16.safetensors")
    save_file({name: tensor.to(torch.float8_e4m3fn) for name, tensor in t5.items()}, folder / "t5xxl_fp8.safetensors")
    for variant, dtype in (("fp8", "bfloat16"), (None, "float16"), ("fp16", "float16")):
        layout = open_source(forms["bare"], text_encoders=folder, variant=variant).component("text_encoder_3").layout()
        assert {str(found) for _, found in layout.values()} == {dtype}
    (folder / "t5xxl_fp16.safetensors").rename(folder / "t5xxl_bf16.safetensors")
    with pytest.raises(CheckpointError, match=r"which of t5xxl_bf16\.s\S+, t5xxl_fp8\.s.* name what follows t5xxl_"):
        open_source(forms["bare"], text_encoders=folder)


def test_the_command_takes_text_encoders(forms: dict[str, Path], tmp_path: Path):
    target = tmp_path / "whole"
    arguments = [str(forms["bare"]), str(target), "--text-encoders", str(forms["diffusers"])]
    assert main(["checkpoint", *arguments]) == 0
    assert components(target) == components(forms["converted"])
    assert sorted(path.name for path in target.glob("tokenizer*")) == ["tokenizer", "tokenizer_2", "tokenizer_3"]


def test_verify_takes_text_encoders_for_a_source_and_for_an_original_that_lack_them(
    forms: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    convert_checkpoint(forms["bare"], tmp_path / "whole", text_encoders=forms["diffusers"])
    also = ["--size", "64", "--text-encoders", str(forms["separate files"]), "--components", "text_encoder", "vae"]
    for pair in ([str(forms["bare"])], [str(tmp_path / "whole"), "--against", str(forms["bare"])]):
        assert main(["verify", *pair, *also, "--json", str(tmp_path / "rows.json")]) == 0
        report = json.loads((tmp_path / "rows.json").read_text())
        assert "text_encoder: pooled" in [row["what"] for row in report["rows"]]
        assert report["text_encoders"] == str(forms["separate files"])
    arguments = [str(forms["bare"]), "--components", "text_encoder", "vae", "--text-encoders", str(forms["converted"])]
    assert main(["verify", *arguments]) == 1
    assert "text_encoder in converted form, which PyTorch cannot read: give text encod" in capsys.readouterr().err


@pytest.fixture(scope="module")
def alone(forms: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The transformer of `bare` alone in a GGUF file, as those of SD3.5 are shared."""
    prefix = COMPONENTS["transformer"].prefix
    tensors = {n.removeprefix(prefix): t.numpy() for n, t in load_file(forms["bare"]).items() if n.startswith(prefix)}
    path = tmp_path_factory.mktemp("alone") / "sd3.5_medium-F16.gguf"
    write_gguf(path, "sd3", tensors, dict.fromkeys(tensors, "F16"))
    return path


@pytest.mark.parametrize("form", ["diffusers", "single file", "converted"])
def test_a_transformer_alone_takes_the_vae_too_from_the_second_source(
    forms: dict[str, Path], alone: Path, tmp_path: Path, form: str
):
    convert_checkpoint(alone, tmp_path / "whole", text_encoders=forms[form], tokenizers=forms["diffusers"])
    assert components(tmp_path / "whole") == components(forms["converted"])


def test_a_transformer_alone_says_what_to_give(forms: dict[str, Path], alone: Path):
    with pytest.raises(CheckpointError, match=r"F16\.gguf has no vae, text_encoder\. .* GGUF, without a VAE"):
        open_source(alone, components=[*WITHOUT, "text_encoder"])
    with pytest.raises(CheckpointError, match=r"F16\.gguf has no vae\. .* \[and vae\.safetensors\]$"):
        open_source(alone, components=[*WITHOUT, "text_encoder"], text_encoders=forms["separate files"])


def test_a_vae_of_other_latents_does_not_fit(forms: dict[str, Path], alone: Path, tmp_path: Path):
    other = Path(shutil.copytree(forms["diffusers"], tmp_path / "other"))
    config = other / "vae" / "config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {"latent_channels": 4}))
    with pytest.raises(CheckpointError, match=r"the VAE's latents have 4 channels, the transformer of .* takes 16"):
        open_source(alone, text_encoders=other)


def test_one_text_encoder_in_a_file_of_its_own_completes_a_source_that_lacks_it(forms: dict[str, Path], tmp_path: Path):
    whole, lacking = forms["diffusers"], [name for name in COMPONENTS if name != "text_encoder_3"]
    convert_checkpoint(whole, tmp_path / "first", components=lacking)
    file = forms["separate files"] / "t5xxl_fp16.safetensors"
    convert_checkpoint(tmp_path / "first", tmp_path / "whole", text_encoders=file, tokenizers=whole)
    assert components(tmp_path / "whole") == components(forms["converted"])


@pytest.mark.parametrize("names", ["stability", "stability, prefixed", "diffusers", "diffusers with its configuration"])
@pytest.mark.parametrize("stem", ["vae", "sd3_vae_fp16", "vae/sd35_vae", "AE"])
def test_a_vae_in_a_file_of_its_own_completes_a_transformer_alone(
    forms: dict[str, Path], alone: Path, tmp_path: Path, names: str, stem: str
):
    folder, prefix = Path(shutil.copytree(forms["separate files"], tmp_path / "files")), COMPONENTS["vae"].prefix
    if names.startswith("stability"):
        tensors = {name: t for name, t in load_file(forms["single file"]).items() if name.startswith(prefix)}
        if names == "stability":
            tensors = {name.removeprefix(prefix): tensor for name, tensor in tensors.items()}
    else:
        tensors = load_file(forms["diffusers"] / "vae" / "diffusion_pytorch_model.safetensors")
    place = folder / f"{stem}.safetensors"
    place.parent.mkdir(exist_ok=True)
    if "configuration" in names:
        shutil.copy(forms["diffusers"] / "vae" / "config.json", place.parent)
    save_file(tensors, place)
    convert_checkpoint(alone, tmp_path / "whole", text_encoders=folder, tokenizers=forms["diffusers"])
    assert components(tmp_path / "whole") == components(forms["converted"])
    config = json.loads((tmp_path / "whole" / "vae" / "config.json").read_text())
    assert parse_config("vae", config) == parse_config("vae", open_source(forms["diffusers"]).configs["vae"])


@pytest.mark.parametrize("names", ["stability", "diffusers"])
def test_a_vaes_configuration_beside_its_file_says_what_shapes_do_not(
    forms: dict[str, Path], alone: Path, tmp_path: Path, names: str
):
    folder, prefix = Path(shutil.copytree(forms["separate files"], tmp_path / "files")), COMPONENTS["vae"].prefix
    tensors = {n.removeprefix(prefix): t for n, t in load_file(forms["single file"]).items() if n.startswith(prefix)}
    if names == "diffusers":
        tensors = load_file(forms["diffusers"] / "vae" / "diffusion_pytorch_model.safetensors")
    save_file(tensors, folder / "vae.safetensors")
    config = json.loads((forms["diffusers"] / "vae" / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"scaling_factor": 0.3611}))
    assert open_source(alone, text_encoders=folder).configs["vae"]["scaling_factor"] == 0.3611


@pytest.mark.parametrize("below", ["text_encoders", "clip"])
def test_a_vae_beside_a_folder_of_text_encoders_hides_none_of_them(
    forms: dict[str, Path], alone: Path, tmp_path: Path, below: str
):
    shutil.copytree(forms["separate files"], tmp_path / "models" / below)
    prefix = COMPONENTS["vae"].prefix
    save_file(
        {n: t for n, t in load_file(forms["single file"]).items() if n.startswith(prefix)},
        tmp_path / "models" / "vae.safetensors",
    )
    convert_checkpoint(alone, tmp_path / "whole", text_encoders=tmp_path / "models", tokenizers=forms["diffusers"])
    assert components(tmp_path / "whole") == components(forms["converted"])


def test_files_of_components_that_do_not_lack_are_not_opened(forms: dict[str, Path], tmp_path: Path):
    folder = Path(shutil.copytree(forms["separate files"], tmp_path / "files"))
    for name in ("vae-ft-mse-840000-ema-pruned", "vae-ft-ema-560000-ema-pruned", "vae_approx"):
        (folder / f"{name}.safetensors").write_text("version https://git-lfs.github.com/spec/v1")
    convert_checkpoint(forms["bare"], tmp_path / "whole", text_encoders=folder, tokenizers=forms["diffusers"])
    assert components(tmp_path / "whole") == components(forms["converted"])


def test_of_two_files_that_differ_in_no_variant_one_is_to_be_left(forms: dict[str, Path], alone: Path, tmp_path: Path):
    folder = Path(shutil.copytree(forms["separate files"], tmp_path / "files"))
    for name in ("vae", "sd3_vae"):
        (folder / f"{name}.safetensors").touch()
    with pytest.raises(CheckpointError, match=r"which of sd3_vae\.s\S+, vae\.s\S+\? To choose, leave one of them in"):
        open_source(alone, text_encoders=folder)


@pytest.mark.parametrize(
    "name", ["google_t5-v1_1-xxl_encoderonly-fp16", "t5-v1_1-xxl-encoder", "T5XXL_fp8_e4m3fn", "t5_xxl"]
)
def test_t5_is_found_under_the_names_that_it_is_shared_by(forms: dict[str, Path], tmp_path: Path, name: str):
    folder = Path(shutil.copytree(forms["separate files"], tmp_path / "files"))
    (folder / "t5xxl_fp16.safetensors").rename(folder / f"{name}.safetensors")
    assert "text_encoder_3" in open_source(forms["bare"], text_encoders=folder).configs


def test_the_command_says_what_it_wrote_and_what_the_checkpoint_lacks(
    forms: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    folder = Path(shutil.copytree(forms["separate files"], tmp_path / "files"))
    (folder / "t5xxl_fp16.safetensors").rename(folder / "other.safetensors")
    more = ["--text-encoders", str(folder), "--tokenizers", str(forms["diffusers"])]
    assert main(["checkpoint", str(forms["bare"]), str(tmp_path / "out"), *more]) == 0
    said = capsys.readouterr().err
    assert f"wrote {tmp_path / 'out'}: transformer, vae, text_encoder, text_encoder_2; it has no text_encoder_3" in said


@pytest.mark.parametrize(("name", "of"), [("clip_l", "vae"), ("t5xxl", "transformer"), ("clip_g", "vae")])
def test_a_file_of_another_component_is_told_in_one_sentence(
    forms: dict[str, Path], tmp_path: Path, name: str, of: str
):
    folder = Path(shutil.copytree(forms["separate files"], tmp_path / "files"))
    for file in folder.glob(f"{name}*"):
        file.unlink()
    shutil.copy(forms["diffusers"] / of / "diffusion_pytorch_model.safetensors", folder / f"{name}.safetensors")
    with pytest.raises(
        CheckpointError, match=rf"{name}\.safetensors: text_encoder\S*: its tensors have the names of an"
    ):
        open_source(forms["bare"], text_encoders=folder)


def test_verify_gives_pytorch_the_tensors_of_gguf_under_its_own_names(
    forms: dict[str, Path], alone: Path, tmp_path: Path
):
    state = {n: t.float().numpy() for n, t in load_file(forms["separate files"] / "t5xxl_fp16.safetensors").items()}
    names = get_tensor_name_map(MODEL_ARCH.T5ENCODER, 24)
    llamas = {f"{names.get_name(n.removesuffix('.weight'))}.weight": t for n, t in state.items()}
    write_gguf(tmp_path / "t5xxl.gguf", "t5encoder", llamas, dict.fromkeys(llamas, "F16"))
    packed = open_source(alone, text_encoders=tmp_path)
    for name, plain in (("transformer", forms["bare"]), ("text_encoder_3", forms["single file"])):
        expected = tensors_of(open_source(plain).component(name))
        found = tensors_of(packed.component(name))
        assert found.keys() == expected.keys() - {"encoder.embed_tokens.weight"} or found.keys() == expected.keys()
        assert all(torch.equal(read(), expected[key]()) for key, read in found.items())
