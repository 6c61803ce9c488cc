"""`seg4diff plan evaluate`: its programs are those that the evaluator runs, and its figures follow from theirs."""

from __future__ import annotations

import importlib.util
import re
from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import numpy as np
import pytest
from flax import nnx
from PIL import Image

import seg4diff_jax as s4d
from seg4diff_jax.command_line import main
from seg4diff_jax.evaluation import readouts, zero_shot
from seg4diff_jax.evaluation.benchmarks import Benchmark, folder_benchmark
from seg4diff_jax.evaluation.measurement import Measurement, Settings
from seg4diff_jax.models.flops import vae_encoder_flops
from seg4diff_jax.parallel import make_mesh
from seg4diff_jax.planning.arithmetic import operations
from seg4diff_jax.planning.chips import Slice
from seg4diff_jax.planning.compiled import Memory, Moved
from seg4diff_jax.planning.evaluator_plan import EvaluatorPlan, ProgramPlan, beside, needed_flops
from seg4diff_jax.planning.evaluator_programs import (
    CANVAS,
    CLASSES_PRESENT,
    EvaluatorConfig,
    EvaluatorModels,
    described,
    each_program,
    settled_config,
)
from seg4diff_jax.planning.hlo import Collective
from seg4diff_jax.planning.placement import read_on_one_chip
from tests.planning.test_plan import run as run_plan
from tests.planning.test_plan import total
from tests.reference.inputs import BLOCK, an_image
from tests.reference.varied_set import NAMES

needs_libtpu = pytest.mark.skipif(importlib.util.find_spec("libtpu") is None, reason="libtpu is not installed")
Shapes = Any

# ---- what is compiled is what the evaluator runs --------------------------------------------------------------------


@pytest.fixture(scope="module")
def benchmark(tmp_path_factory) -> Benchmark:
    """Four images of that canvas, each with as many classes as a plan supposes."""
    root = tmp_path_factory.mktemp("plan") / "set"
    for folder in ("images", "labels"):
        (root / folder).mkdir(parents=True)
    (root / "classes.txt").write_text("\n".join(NAMES))
    height, width = 300, CANVAS[1] - 100
    stripes = np.arange(width) * CLASSES_PRESENT // width
    for index in range(4):
        Image.fromarray(an_image(height, width, index)).save(root / "images" / f"{index}.png")
        labels = np.broadcast_to(stripes + index, (CANVAS[0] - 100, width)).astype(np.uint8)
        Image.fromarray(labels).resize((width, height), Image.Resampling.NEAREST).save(root / "labels" / f"{index}.png")
    return folder_benchmark(root)


def abstract(arguments: Any) -> Shapes:
    """Shape and dtype of every array of arguments, in their order; of a model those of its parameters."""
    about = lambda leaf: (np.shape(leaf), jax.dtypes.canonicalize_dtype(np.result_type(leaf)).name)
    arguments = [nnx.state(each) if isinstance(each, nnx.Module) else each for each in arguments]
    return [about(leaf) for leaf in jax.tree.leaves(arguments)]


class Watched:
    """A jitted function that notes what it is called with."""

    def __init__(self, function: Any, calls: list[tuple[str, Shapes, dict[str, Any]]]):
        self.function, self.calls = function, calls

    def __call__(self, *arguments: Any, **static: Any) -> Any:
        self.calls.append((self.function.__name__, abstract(arguments), static))
        return self.function(*arguments, **static)


def planned_calls(config: EvaluatorConfig) -> list[tuple[str, Shapes, dict[str, Any]]]:
    found: list[tuple[str, Shapes, dict[str, Any]]] = []

    def note(name: str, runs: int, function: Any, *arguments: Any, **static: Any) -> Any:
        found.extend([(function.__name__, abstract(arguments), static)] * runs)
        return jax.eval_shape(partial(function, **static), *arguments)

    traced(config, note)
    return found


def traced(config: EvaluatorConfig, run: Callable[..., Any]) -> EvaluatorConfig:
    checkpoint, mesh = described(config), make_mesh()
    config = settled_config(config, checkpoint, 1)
    each_program(config, checkpoint, EvaluatorModels.of(config, checkpoint, mesh), mesh, run)
    return config


@pytest.mark.parametrize("prompts", ["present", "all"])
def test_the_programs_of_a_batch_are_those_that_the_evaluator_runs(prompts, benchmark, sd3_checkpoint, monkeypatch):
    pipe = s4d.load(sd3_checkpoint, blocks=BLOCK + 1)
    measurement = Measurement(pipe, benchmark, Settings((BLOCK,), (8,), (0,), 2, prompts=(prompts,)))
    asked = measurement.asked[prompts](measurement.reader.example(0))[1]
    calls: list[tuple[str, Shapes, dict[str, Any]]] = []
    for module, name in [
        (readouts, "encode_images"),
        (s4d.pipeline.passes, "encode_prompts"),
        (readouts, "attention_maps"),
        *((zero_shot, each) for each in ("add_scores", "count", "without_images")),
    ]:
        monkeypatch.setattr(module, name, Watched(getattr(module, name), calls))
    measurement.outcome()
    first = [place for place, call in enumerate(calls) if call[0] == "encode_images"]
    assert len(first) == 2
    config = EvaluatorConfig(
        model=str(sd3_checkpoint),
        dtype="float32",
        block=BLOCK,
        batch_size=2,
        prompts=prompts,
        prompts_per_image=len(asked.prompts),
        classes=len(NAMES),
    )
    assert config.prompts_per_image == (1 if prompts == "present" else 2)
    by_name = lambda some: sorted(some, key=lambda call: (call[0], str(call)))
    assert by_name(planned_calls(config)) == by_name(calls[first[1] :]), "of the second batch"
    encoded = [call for call in calls[: first[1]] if call[0] == "encode_prompts"]
    assert len(encoded) == 1, "a vocabulary is encoded with the first batch, and then no more"


def test_programs_do_what_masks_need_and_hardly_more():
    done: dict[str, float] = {}

    def note(name: str, runs: int, function: Any, *arguments: Any, **static: Any) -> Any:
        program = function.trace(*arguments, **static)
        done[name] = runs * operations(program.jaxpr)
        return program.out_info

    whole = EvaluatorConfig(batch_size=1, prompts="all", prompts_per_image=3)
    for config in (EvaluatorConfig(batch_size=1), whole):
        done.clear()
        config, count = traced(config, note), config.prompts_per_image
        checkpoint = described(config)
        assert done["autoencoder"] == pytest.approx(vae_encoder_flops(checkpoint.vae, 1024, 1024), rel=1e-3)
        assert done["blocks"] / count / 1e12 == pytest.approx(3.165 + 0.092, rel=0.03), "counted by hand, of 154 tokens"
        without = sum(done.values()) - done["counting"] - done["scores"]
        assert needed_flops(config, checkpoint) <= without <= 1.03 * needed_flops(config, checkpoint)
        assert done["counting"] + done["scores"] <= 0.01 * without


def test_arrays_that_a_program_does_not_read_take_no_place_in_its_memory():
    place = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    array = jax.ShapeDtypeStruct((8, 4), np.float32, sharding=place)
    function = jax.jit(lambda pair, x, seed: pair[1] @ x + seed)
    arguments = ((array, array), jax.ShapeDtypeStruct((4, 2), np.float32, sharding=place), 3)
    assert read_on_one_chip(function.trace(*arguments).jaxpr, arguments) == [128.0, 32.0, 0.0]


# ---- figures --------------------------------------------------------------------------------------------------------


def made(name: str, runs: int, tera: float, hbm: float, received: float = 0.0, size: float = 1.0) -> ProgramPlan:
    collectives = (Collective("all-gather", 2, received),) if received else ()
    parts = {"transformer": size / 8, "autoencoder": size / 8, "text encoders": size / 4, "temporaries": size / 2}
    memory = Memory(parts, size, 16.0)
    return ProgramPlan(name, runs, tera * 1e12, memory, Moved(hbm, collectives))


PROGRAMS = (
    made("autoencoder", 1, 19.7, 8.19e9),
    made("blocks", 3, 1.97, 8.19e9, received=400e9, size=9.0),
    made("counting", 3, 0.0, 8.19e9, size=2.0),
)


def plan_of(programs: tuple[ProgramPlan, ...], where: str = "v5e:4x4") -> EvaluatorPlan:
    config = EvaluatorConfig(block=9, size=1024, batch_size=8, prompts="all", prompts_per_image=3)
    return EvaluatorPlan(Slice.parse(where), config, programs, 5e12, 1.0)


def test_programs_run_one_after_the_other_each_as_fast_as_its_slowest_part():
    plan = plan_of(PROGRAMS)
    # 0.1 s by arithmetic; 3 x 2 s by the interconnect; 3 x 0.01 s by HBM.
    assert plan.images == 4 * 8, "each of four hosts has a batch"
    assert plan.images_per_second == pytest.approx(32 / (0.1 + 6 + 0.03))
    assert plan.bounds == pytest.approx({"compute": 0.13, "HBM": 0.07, "interconnect": 6.0})
    assert plan.fullest.name == "blocks"


def test_all_weights_stay_on_the_chip_while_a_program_runs():
    memory = beside(
        Memory({"weights": 2.0, "batch": 1.0, "code": 4.0}, 7.0, 16.0), {"transformer": 8.0, "prompts": 0.5}
    )
    assert memory.parts == {"transformer": 8.0, "prompts": 0.5, "batch": 1.0, "code": 4.0}
    assert memory.total == 13.5


@pytest.mark.parametrize(("size", "status", "words"), [(15.0, 0, ": fits"), (17.0, 1, ": does not fit")])
def test_the_exit_status_is_the_verdict(size, status, words, monkeypatch, capsys):
    import seg4diff_jax.command_line.plan_evaluate as command

    seen: list[Any] = []

    def plan(config: EvaluatorConfig, where: Slice, on_program: Callable[[str, float], None]) -> EvaluatorPlan:
        seen.append((config, where))
        on_program("scores", 61.3)
        return plan_of((*PROGRAMS, made("scores", 3, 0, 0, size=size)), where.name)

    monkeypatch.setattr(command, "plan_evaluator", plan)
    options = ["--topology=v5p:2x2x1", "--prompts=all", "--prompts-per-image=3", "--classes=171", "--size=512"]
    assert main(["plan", "evaluate", *options]) == status
    printed, told = capsys.readouterr()
    assert told == "scores: compiled in 61 s\n"
    assert words in printed
    assert "v5p:2x2x1: 1 host of 4 chips; sd3-medium, bfloat16, 1024 px, block 9" in printed
    config, _ = seen[0]
    assert (config.prompts, config.prompts_per_image, config.classes, config.size) == ("all", 3, 171, 512)
    assert main(["plan", "evaluate", *options, "--markdown"]) == status
    rows = capsys.readouterr().out.splitlines()
    assert {row.count("|") for row in rows} == {12}


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--topology=v5e"], "as in v5e:4x4"),
        (["--topology=v5e:2x2", "--model=nothing"], "nothing: expected one of sd3-medium"),
        (["--topology=v5e:2x2", "--model=sd3.5-large"], "does not say which block segments best"),
        (["--topology=v5e:2x2", "--block=24"], "block is 24; sd3-medium has blocks 0..23"),
        (["--topology=v5e:2x2", "--batch-size=6"], "--batch-size is 6; expected a multiple of the 4 chips of a host"),
        (["--topology=v5e:2x2", "--batch-size=0"], "--batch-size is 0; expected at least 1"),
        (["--topology=v5e:2x2", "--prompts-per-image=0"], "--prompts-per-image is 0; expected 1 to 150"),
        (["--topology=v5e:2x2", "--classes=256"], "--classes is 256; expected 1 to 255"),
        (["--topology=v5e:2x2", "--size=100"], "100"),
    ],
)
def test_what_cannot_be_planned_is_said(arguments, words, capsys):
    assert main(["plan", "evaluate", *arguments]) == 2
    assert words in capsys.readouterr().err


def test_a_host_has_four_chips_or_all_of_a_smaller_slice():
    hosts = {name: Slice.parse(name).host.name for name in ("v5e:1x1", "v5e:4x8", "v5p:2x2x1", "v5p:4x4x4")}
    assert hosts == {"v5e:1x1": "v5e:1x1", "v5e:4x8": "v5e:2x2", "v5p:2x2x1": "v5p:2x2x1", "v5p:4x4x4": "v5p:2x2x1"}


def test_a_batch_has_as_many_images_as_the_evaluator_takes():
    checkpoint = described(EvaluatorConfig())
    batches = {size: settled_config(EvaluatorConfig(size=size), checkpoint, 4).batch_size for size in (None, 512, 2048)}
    assert batches == {None: 16, 512: 64, 2048: 4}


# ---- compiled -------------------------------------------------------------------------------------------------------


@needs_libtpu
def test_an_evaluation_of_the_miniature_is_planned_for_four_chips():
    done = run_plan("evaluate", "--model=miniature", "--topology=v5e:2x2", "--batch-size=8", "--classes=32")
    assert done.returncode == 0, done.stderr[-4000:]
    assert total(done.stdout) < 1e9
    assert [re.search(rf"^  {name} +\d", done.stdout, re.MULTILINE) for name in ("autoencoder", "blocks", "counting")]
    assert re.search(r"at most [\d.]+ images/s, [\d.]+ a chip", done.stdout)


@pytest.mark.slow
@needs_libtpu
def test_three_prompts_an_image_take_at_most_twice_and_a_fifth_the_time_of_one():
    rates = []
    for options in ([], ["--prompts=all", "--prompts-per-image=3"]):
        done = run_plan("evaluate", "--topology=v5e:1x1", *options)
        assert done.returncode == 0, done.stderr[-4000:]
        assert total(done.stdout) <= 16e9
        found = re.search(r"at most ([\d.]+) images/s", done.stdout)
        assert found is not None
        rates.append(float(found[1]))
    assert 1 < rates[0] / rates[1] <= 2.2
