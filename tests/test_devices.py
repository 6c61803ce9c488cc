"""What docs/devices.md says of memory is what configurations count, and what runs says on which device."""

from __future__ import annotations

import math
import re

import jax
import pytest
from flax import nnx

from convert.components import abstract_model
from seg4diff_jax.command_line import main
from seg4diff_jax.parallel import named_devices
from seg4diff_jax.planning.checkpoints import describe
from tests.reference.documents import ROOT

TEXT = (ROOT / "docs" / "devices.md").read_text("utf-8")
ENCODERS = ("vae", "text_encoder", "text_encoder_2")


def parameters(model: str, name: str, depth: int | None = None) -> int:
    state = nnx.state(abstract_model(name, describe(model).configs[name], depth=depth))
    return sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(state))


def spaced(number: int) -> str:
    return f"{number:,}".replace(",", " ")


@pytest.mark.parametrize("model", ["SD3-medium", "SD3.5-medium", "SD3.5-large"])
def test_the_memory_of_weights_is_counted_from_their_configurations(model):
    (line,) = [line for line in TEXT.splitlines() if line.startswith(f"| {model} |")]
    said, *gibibytes = [cell.strip() for cell in line.strip("|").split("|")[1:]]
    transformer, first = (parameters(model.lower(), "transformer", depth) for depth in (None, 10))
    others = sum(parameters(model.lower(), name) for name in ENCODERS)
    assert said == spaced(transformer)
    expected = [(each + others) * size / 2**30 for each in (transformer, first) for size in (2, 4)]
    assert gibibytes == [f"{each:.2f} GiB" for each in expected]


def test_the_parts_that_all_of_them_share_are_counted_too():
    text = " ".join(TEXT.split())
    assert all(spaced(parameters("sd3-medium", name)) in text for name in ENCODERS)
    t5 = parameters("sd3-medium", "text_encoder_3")
    assert f"{spaced(t5)} more: {2 * t5 / 2**30:.2f} or {4 * t5 / 2**30:.2f} GiB" in text


def test_devices_are_named_with_their_number():
    kind = jax.devices()[0].device_kind
    assert named_devices(1) == kind
    assert named_devices(4) == f"4 x {kind}"
    assert named_devices() in (kind, f"{jax.device_count()} x {kind}")


def test_a_command_says_what_it_runs_on(sd3_checkpoint, tmp_path, capsys):
    options = ["--steps", "1", "--out", str(tmp_path / "out"), "--size", "64x64", "--model", str(sd3_checkpoint)]
    assert main(["generate", "a cat", *options]) == 0
    assert re.search(rf"^loaded .*, float32 on {jax.devices()[0].device_kind}$", capsys.readouterr().err, re.M)
