"""`seg4diff plan`: shapes are those of a real run, counts those of a brute force, and the verdict is the compiler's."""

from __future__ import annotations

import importlib.util
import json
import os
import re
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from flax import nnx
from jax.errors import JaxRuntimeError

from seg4diff_jax.command_line import main
from seg4diff_jax.command_line.train import parse
from seg4diff_jax.convert.errors import CheckpointError
from seg4diff_jax.data.loader import training_batches
from seg4diff_jax.magnet.task import image_size, open_checkpoint, task
from seg4diff_jax.miniature.world.shapes import scene, write_folder
from seg4diff_jax.parallel import make_mesh
from seg4diff_jax.planning import plan as planning
from seg4diff_jax.planning.checkpoints import TRANSFORMERS, describe
from seg4diff_jax.planning.chips import CHIPS, Slice
from seg4diff_jax.planning.compiled import Memory, Moved, measured, refused
from seg4diff_jax.planning.largest import largest_batch
from seg4diff_jax.planning.magnet_shapes import abstract_batch, abstract_magnet, described
from seg4diff_jax.planning.plan import Plan
from seg4diff_jax.training.state import name as dotted
from tests.reference.processes import as_users_compile

ROOT = Path(__file__).parents[2]
COCO = ["--config", str(ROOT / "configs" / "magnet" / "coco.yaml")]
needs_libtpu = pytest.mark.skipif(importlib.util.find_spec("libtpu") is None, reason="libtpu is not installed")


# ---- what is compiled is what is trained ----------------------------------------------------------------------------


@pytest.fixture(scope="module")
def options(sd3_checkpoint, tmp_path_factory) -> list[str]:
    folder = tmp_path_factory.mktemp("plan") / "folder"
    write_folder(folder, [scene("train", index, 64) for index in range(3)])
    texts = {"model": sd3_checkpoint, "block": 3, "data.name": "folder", "data.root": folder, "data.size": 64}
    texts |= {"lora.rank": 2, "run.batch_size": 2, "held_out.count": 0, "data.crop": "center", "dtype": "float32"}
    return [*COCO, *(f"--{name}={value}" for name, value in texts.items())]


VARIANTS = {
    "words": [],
    "T5": ["--t5=true"],
    "a cache": ["--cache=CACHE"],
    "the release's positions and head": ["--positions=release", "--objective.mask_head=conv"],
}


@pytest.mark.parametrize("variant", VARIANTS)
def test_model_and_batch_have_the_shapes_and_places_of_a_real_run(variant, options, tmp_path):
    changes = [change.replace("CACHE", str(tmp_path / "cache")) for change in VARIANTS[variant]]
    config = parse([*options, *changes]).config
    mesh, made = make_mesh(), task(config)
    seen, planned = open_checkpoint(config), described(config)
    about = lambda x: (x.block(config.block), image_size(config, x), x.clip_tokens, x.encoder_names, x.configs)
    assert about(planned) == about(seen)
    assert facts(abstract_magnet(config, planned, mesh)) == facts(made.init(0, mesh))
    batch = next(training_batches(made.source, batch_size=2, seed=0, augment=made.augment))
    batch = {name: np.asarray(array) for name, array in batch.items()}
    if "name_ids" in batch:  # whose width a plan does not know
        assert batch["name_ids"].shape[2] <= planned.clip_tokens
        batch["name_ids"] = np.zeros((2, config.data.rows, planned.clip_tokens), np.int32)
    expected = abstract_batch(config, planned, mesh)
    same = {name: (leaf.shape, leaf.dtype) for name, leaf in expected.items()}
    assert {name: (array.shape, array.dtype) for name, array in batch.items()} == same


def facts(model: nnx.Module) -> dict:
    arrays = {dotted(path): variable.get_value() for path, variable in nnx.to_flat_state(nnx.state(model))}
    return {name: (array.shape, array.dtype, array.sharding.spec) for name, array in arrays.items()}


def test_masks_without_names_have_the_items_shapes(options):
    pytest.importorskip("pycocotools")
    from seg4diff_jax.magnet.items import Pictures, ViewItems
    from seg4diff_jax.text import Tokenizers

    words = [*options, "--data.name=sa1b", "--objective.targets=matching", "--data.rows=5"]
    config = parse(words).config
    tokenizers: Tokenizers = open_checkpoint(config).tokenizers
    items = ViewItems(Pictures([], None, []), config.data, 64, tokenizers)
    item = {"image": np.zeros((64, 64, 3), np.uint8), "masks": np.ones((1, 64, 64), bool), "caption": "cat"}
    expected = abstract_batch(config, described(config), make_mesh())
    expected.pop("index")
    found = {name: (array.shape, array.dtype) for name, array in items.fixed(item).items()}
    assert found == {name: (leaf.shape[1:], leaf.dtype) for name, leaf in expected.items()}


# ---- checkpoints ----------------------------------------------------------------------------------------------------


def test_a_published_checkpoint_is_known_by_name_and_has_no_weights():
    by_id = describe("stabilityai/stable-diffusion-3-medium-diffusers")
    assert by_id.configs == describe("sd3-medium").configs
    assert by_id.expert_block == 9
    assert by_id.trained_size == 1024
    with pytest.raises(CheckpointError, match="its transformer has no weights"):
        by_id.component("transformer")


def test_a_directory_needs_the_transformers_configuration_alone(tmp_path):
    with pytest.raises(CheckpointError, match=r"expected one of sd3-medium, .* or a directory with transformer/config"):
        describe(str(tmp_path))
    (tmp_path / "transformer").mkdir()
    small = TRANSFORMERS["sd3-medium"] | {"num_layers": 3, "expert_block": 1}
    (tmp_path / "transformer" / "config.json").write_text(json.dumps(small))
    source = describe(str(tmp_path))
    assert source.expert_block == 1
    assert source.configs["vae"] == describe("sd3-medium").configs["vae"]


# ---- the verdict ----------------------------------------------------------------------------------------------------

ANALYSIS = SimpleNamespace(
    argument_size_in_bytes=1100,
    temp_size_in_bytes=500,
    output_size_in_bytes=400,
    alias_size_in_bytes=390,
    generated_code_size_in_bytes=20,
)
FULL = "RESOURCE_EXHAUSTED: Ran out of memory in memory space hbm. Used 18.50G of 15.75G hbm. Exceeded by 2.75G."
TOO_MANY = (
    "RESOURCE_EXHAUSTED: E1000: CompileTimeHbmOom: Ran out of memory on HBM, the total memory required for HLO "
    "temporaries (49.11G) exceeds available HBM (31.24G). HLO module: jit_training_step."
)


def test_memory_is_arguments_temporaries_and_what_is_not_given_back_in_place():
    memory = measured(ANALYSIS, {"base": 900.0, "batch": 150.0}, limit=1630.0)
    assert memory.parts["padding"] == 50
    assert memory.parts["output"] == 10
    assert memory.total == 1100 + 500 + 10 + 20
    assert memory.fits
    assert not measured(ANALYSIS, {"base": 900.0}, limit=1629.0).fits


def test_the_compilers_refusal_is_a_verdict_and_every_other_error_is_one():
    memory = refused(FULL, {"base": 2.0**30}, limit=16.0 * 2**30)
    assert not memory.fits
    assert (memory.total, memory.limit) == (18.5 * 2**30, 15.75 * 2**30)
    beside = refused(TOO_MANY, {"base": 2.0**30}, limit=32.0 * 2**30)
    assert beside.parts == {"base": 2.0**30, "temporaries": pytest.approx(49.11 * 2**30)}
    assert (beside.fits, beside.limit) == (False, 31.24 * 2**30)
    vast = refused(TOO_MANY.replace("49.11G", "2.15T"), {}, limit=32.0 * 2**30)
    assert vast.total == pytest.approx(2.15 * 2**40)
    with pytest.raises(JaxRuntimeError, match="INTERNAL"):
        refused("INTERNAL: something else", {}, limit=1.0)


def made(batch: int, total: float, limit: float, where: str = "v5e:2x2") -> Plan:
    memory = Memory({"temporaries": float(total)}, float(total), float(limit))
    return Plan(Slice.parse(where), (4, 1, 1), batch, memory, 1e12, 2e12, Moved(8.19e9, ()), 1.0)


@pytest.mark.parametrize(("limit", "status", "words"), [(10, 0, ": fits"), (9, 1, ": does not fit")])
def test_the_exit_status_is_the_verdict(limit, status, words, monkeypatch, capsys):
    monkeypatch.setattr(planning, "plan_magnet", lambda config, where: made(config.run.batch_size, 10, limit))
    assert main(["plan", *COCO, "--topology=v5e:2x2", "--run.batch_size=8"]) == status
    printed = capsys.readouterr().out
    assert words in printed
    assert "batch 8" in printed
    assert re.search(r"compute +10\.2\n +HBM +10\.0\n", printed)
    assert "compute dominates" in printed


def test_the_largest_batch_is_found_in_few_compilations(monkeypatch, capsys):
    monkeypatch.setattr(
        planning, "plan_magnet", lambda config, where: made(config.run.batch_size, 100 + config.run.batch_size, 200.5)
    )
    assert main(["plan", *COCO, "--topology=v5e:2x2", "--largest-batch", "--markdown"]) == 0
    printed = capsys.readouterr()
    assert "| 100 |" in printed.out
    assert len(printed.err.splitlines()) <= 5


@pytest.mark.parametrize("limit", [104, 104.5, 117, 163, 5000])
def test_the_next_larger_batch_does_not_fit(limit):
    total = lambda batch: 100 + batch + (8 if batch > 12 else 0)  # not quite linear
    plans = {plan.batch_size: plan for plan in largest_batch(lambda batch: made(batch, total(batch), limit), 4)}
    best = max((batch for batch, plan in plans.items() if plan.memory.fits))
    assert not plans[best + 4].memory.fits


def test_a_compiler_that_holds_a_larger_batch_in_less_does_not_mislead_the_search():
    total = lambda batch: 100 + 10 * batch - (15 if batch % 2 == 0 else 0)

    def plan(batch: int) -> Plan:
        found = made(batch, total(batch), 316)
        given_up = Memory({"temporaries": 7.0}, 7.0, 315.0, gave_up=True)  # of what does not fit the size is unknown
        return found if found.memory.fits else replace(found, memory=given_up)

    plans = {plan.batch_size: plan for plan in largest_batch(plan, 1)}
    best = max(batch for batch, plan in plans.items() if plan.memory.fits)
    assert not plans[best + 1].memory.fits
    assert best in (21, 22)  # 20 and 22 fit, 21 just so, 23 does not
    assert len(plans) <= 8


def test_a_step_that_never_fits_has_no_largest_batch():
    assert [plan.memory.fits for plan in largest_batch(lambda batch: made(batch, 9, 1), 4)] == [False]


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--topology=v9:2x2"], "one of v5e, v5p, v6e"),
        (["--topology=v5e"], "as in v5e:4x4"),
        (["--topology=v5p:2x2"], "slices of v5p have 3 sides, as in v5p:2x2x2"),
        (["--topology=v5e:32x32"], "topology is 'v5e:32x32', 1024 chips; slices of v5e have at most 256"),
        (["--topology=v5e:2x2", "--model=nothing"], "nothing: expected one of sd3-medium"),
        (["--topology=v5e:2x2", "--config=nowhere.yaml"], "nowhere.yaml: cannot be read: No such file or directory"),
    ],
)
def test_what_cannot_be_planned_is_said(arguments, words, capsys):
    assert main(["plan", *COCO, *arguments]) == 2
    assert words in capsys.readouterr().err


@needs_libtpu
def test_a_mesh_without_devices_is_refused(capsys):
    assert main(["plan", *COCO, "--topology=v5e:2x2", "--largest-batch", "--run.mesh.tensor=0"]) == 2
    assert "run.mesh.tensor is 0; expected 1 to 2^40" in capsys.readouterr().err


def test_tasks_without_plans_are_refused(capsys):
    other = str(ROOT / "configs" / "miniature" / "autoencoder.yaml")
    assert main(["plan", "--config", other, "--topology=v5e:2x2"]) == 2
    assert "plans are made for magnet" in capsys.readouterr().err


def test_without_the_compiler_it_is_said_what_to_install(monkeypatch, capsys):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    assert main(["plan", *COCO, "--topology=v5e:2x2"]) == 2
    assert "pip install" in capsys.readouterr().err


def test_chips_have_their_documented_facts():
    assert {name: (chip.flops, chip.memory / 2**30) for name, chip in CHIPS.items()} == {
        "v5e": (197e12, 16),
        "v5p": (459e12, 95),
        "v6e": (918e12, 32),
    }


# ---- compiled -------------------------------------------------------------------------------------------------------


def run(*arguments: str) -> subprocess.CompletedProcess:
    given = os.environ | as_users_compile()  # libtpu ends where it meets a flag that it does not know
    environment = {name: value for name, value in given.items() if name not in ("JAX_PLATFORMS", "TPU_SKIP_MDS_QUERY")}
    command = [sys.executable, "-m", "seg4diff_jax", "plan", *arguments]
    return subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)


def total(printed: str) -> float:
    """Bytes that a plan says a chip holds."""
    found = re.search(r"^ +total +([\d.]+) ", printed, re.MULTILINE)
    assert found is not None, printed
    return float(found[1]) * 2**30


@needs_libtpu
def test_the_miniature_is_planned_for_four_chips():
    config = ["--config", "configs/magnet/miniature.yaml", "--model=miniature", "--dtype=bfloat16"]
    done = run(*config, "--topology=v5e:2x2", "--run.mesh.fsdp=4")
    assert done.returncode == 0, done.stderr[-4000:]
    assert total(done.stdout) < 1e9
    assert re.search(r"all-gather +\d", done.stdout)
    refused = run(*config, "--topology=v5e:2x2", "--run.mesh.fsdp=3")
    assert refused.returncode == 2
    assert "v5e:2x2: fsdp x tensor is 3 x 1 = 3, which does not divide the 4 devices" in refused.stderr


@pytest.mark.slow
@needs_libtpu
@pytest.mark.parametrize("cache", [["--cache=cache"], []], ids=["cached", "with encoders"])
def test_a_step_of_sd3_medium_at_1024_pixels_fits_in_24_gb(cache):
    done = run(*COCO, "--topology=v6e:1x1", "--data.crop=center", *cache)
    assert done.returncode == 0, done.stderr[-4000:]
    assert total(done.stdout) <= 24e9


@pytest.mark.slow
@needs_libtpu
def test_sd35_large_trains_on_chips_of_16_gb():
    large = ["--model=sd3.5-large", "--block=19", "--data.crop=center", "--cache=cache", "--run.batch_size=16"]
    done = run(*COCO, *large, "--topology=v5e:4x4", "--run.mesh.fsdp=16")
    assert done.returncode == 0, done.stderr[-4000:]
    assert total(done.stdout) <= 16e9
