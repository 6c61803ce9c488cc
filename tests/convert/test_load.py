"""Loading converts on the way: only what is needed is read, and a layer at a time is in memory."""

from __future__ import annotations

import json
import math
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from flax import nnx

from seg4diff_jax.convert import components
from seg4diff_jax.convert.checkpoint import convert_checkpoint
from seg4diff_jax.convert.components import abstract_model
from seg4diff_jax.convert.load import load_component
from seg4diff_jax.convert.sources import native
from seg4diff_jax.convert.sources.open import MINIATURE, open_source
from seg4diff_jax.convert.sources.safetensors_stream import TensorInfo
from tests.reference.checkpoints import make_checkpoint
from tests.reference.small_tokenizers import write_clip_tokenizer

DEPTH = 3


@pytest.fixture(scope="module")
def layout(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_checkpoint(tmp_path_factory.mktemp("load") / "sd3", dtype=torch.float16, t5=False)


@pytest.fixture(scope="module")
def converted(layout: Path) -> Path:
    convert_checkpoint(layout, layout.parent / "native")
    return layout.parent / "native"


def test_a_limited_depth_reads_only_its_blocks_tensors(layout: Path, monkeypatch: pytest.MonkeyPatch):
    source = open_source(layout)
    tensors = source.component("transformer").tensors  # pyright: ignore[reportAttributeAccessIssue]
    names = {(info.file, info.offset): name for name, info in tensors.items()}
    read: list[str] = []
    original = TensorInfo.read
    monkeypatch.setattr(
        TensorInfo, "read", lambda info, once: (read.append(names[info.file, info.offset]), original(info))[1]
    )
    model = load_component(source, "transformer", depth=DEPTH)
    blocks = {int(name.split(".")[1]) for name in read if name.startswith("transformer_blocks.")}
    assert blocks == set(range(DEPTH))
    assert not any(name.startswith(("norm_out", "proj_out")) for name in read)
    assert len(read) == len(set(read))
    assert model.depth == DEPTH  # pyright: ignore[reportAttributeAccessIssue]


def test_a_limited_depth_opens_only_its_blocks_parts(converted: Path, monkeypatch: pytest.MonkeyPatch):
    opened: list[str] = []
    original = native.NativeComponent.read_part
    monkeypatch.setattr(
        native.NativeComponent, "read_part", lambda self, part: (opened.append(part), original(self, part))[1]
    )
    load_component(converted, "transformer", depth=DEPTH)
    assert sorted(opened) == ["base", *(f"blocks.{i}" for i in range(DEPTH))]


def test_the_first_blocks_of_a_limited_model_are_those_of_the_whole(layout: Path):
    whole, limited = (load_component(layout, "transformer", depth=depth) for depth in (None, DEPTH))
    states = [nnx.to_pure_dict(nnx.state(model)) for model in (whole, limited)]
    first = [state["stacks"][0] for state in states]
    for ours, theirs in zip(jax.tree.leaves(first[1]), jax.tree.leaves(first[0]), strict=True):
        np.testing.assert_array_equal(ours, theirs[:DEPTH])


@pytest.mark.parametrize("dtype", [None, jnp.bfloat16, jnp.float32])
def test_parameters_and_computation_take_the_dtype_asked_for_or_the_checkpoints(layout: Path, converted: Path, dtype):
    for source in (layout, converted):
        model = load_component(source, "text_encoder", dtype=dtype)
        found = {leaf.dtype for leaf in jax.tree.leaves(nnx.state(model))}
        assert found == {jnp.dtype(dtype or jnp.float16)}


def test_parameters_land_on_the_sharding_asked_for(layout: Path):
    mesh = jax.sharding.Mesh(np.array(jax.devices()[:1]), ("data",))
    sharding = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec())
    asked: dict[str, tuple[int, ...]] = {}
    model = load_component(
        layout, "transformer", depth=2, shardings=lambda path, shape: (asked.update({path: shape}), sharding)[1]
    )
    assert all(leaf.sharding == sharding for leaf in jax.tree.leaves(nnx.state(model)))
    assert any(shape[0] == 2 for path, shape in asked.items() if path.startswith("stacks.0."))


PEAK = """
import sys
import numpy as np
from pathlib import Path
from seg4diff_jax.convert import components
from seg4diff_jax.convert.checkpoint import convert_checkpoint

def resident(key):
    return next(int(line.split()[1]) / 1024 for line in open("/proc/self/status") if line.startswith(key))

small, large, target = map(Path, sys.argv[1:])
convert_checkpoint(small, target / "first")  # imports and thread pools are up
before = resident("VmRSS")
convert_checkpoint(large, target / "second")
print(resident("VmHWM") - before)
"""


def test_memory_in_converting_is_bounded_by_layers_not_by_the_model(tmp_path: Path):
    """A CLIP of 20 layers of 19 MB each takes less than half of its 400 MB."""
    sizes = {"small": (64, 2), "large": (1248, 20)}
    for name, (width, layers) in sizes.items():
        write_clip(tmp_path / name, width, layers)
    command = [sys.executable, "-c", PEAK, str(tmp_path / "small"), str(tmp_path / "large"), str(tmp_path)]
    printed = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    layer = 12 * 1248**2 * 2 / 2**20
    total = 20 * layer
    # Three layers in flight, two of them once more inside Orbax, and the tensor that is being transposed.
    assert float(printed) < 8 * layer < total / 2


def test_a_large_layer_is_written_in_parts_of_bounded_size(
    monkeypatch: pytest.MonkeyPatch, layout: Path, tmp_path: Path
):
    monkeypatch.setattr(components, "PART_SIZE", 5_000)
    convert_checkpoint(layout, tmp_path / "native", components=["text_encoder"])
    reader = open_source(tmp_path / "native").component("text_encoder")
    records = reader.records  # pyright: ignore[reportAttributeAccessIssue]
    assert {"blocks.0", "blocks.0-1", "blocks.2-1"} < records.keys()
    for part in records.values():
        sizes = [math.prod(record["shape"]) for record in part.values()]
        assert len(sizes) == 1 or sum(sizes) <= 5_000
    expected = dict(open_source(layout).component("text_encoder").parameters())
    found = dict(reader.parameters())
    assert all(np.array_equal(found[name], array) for name, array in expected.items())


def write_clip(directory: Path, width: int, layers: int) -> None:
    """A checkpoint whose only component is a CLIP in fp16."""
    import json

    from transformers import CLIPTextConfig, CLIPTextModelWithProjection

    config = CLIPTextConfig(
        vocab_size=64, hidden_size=width, intermediate_size=4 * width, num_hidden_layers=layers,
        num_attention_heads=width // 16, projection_dim=16, eos_token_id=2,
    )  # fmt: skip
    with torch.device("meta"):
        model = CLIPTextModelWithProjection(config).half()
    model.to_empty(device="cpu").save_pretrained(directory / "text_encoder")
    write_clip_tokenizer(directory / "tokenizer", pad_token="!")
    (directory / "model_index.json").write_text(
        json.dumps({"text_encoder": ["transformers", "CLIPTextModelWithProjection"], "tokenizer": ["transformers", ""]})
    )


def test_an_abstract_model_is_its_askers_own():
    config = json.loads((MINIATURE / "vae" / "config.json").read_text())
    first = abstract_model("vae", config)
    kernel = first.encoder.conv_in.kernel
    shape = kernel.get_value().shape
    kernel.set_value(jax.ShapeDtypeStruct((1,), jnp.float32))
    assert abstract_model("vae", config).encoder.conv_in.kernel.get_value().shape == shape
