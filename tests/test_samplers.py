"""A checkpoint saved with another of diffusers' samplers: masks keep the model's noise levels, pictures name it."""

from __future__ import annotations

import json
import os
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from diffusers import (
    DDIMScheduler,
    DEISMultistepScheduler,
    DPMSolverMultistepScheduler,
    DPMSolverSinglestepScheduler,
    EulerDiscreteScheduler,
    FlowMatchEulerDiscreteScheduler,
    FlowMatchHeunDiscreteScheduler,
    FlowMatchLCMScheduler,
    SASolverScheduler,
    UniPCMultistepScheduler,
)
from jsonargparse import ArgumentParser

from seg4diff_jax.command_line import generate
from seg4diff_jax.convert.checkpoint import convert_checkpoint
from seg4diff_jax.convert.errors import CheckpointError
from seg4diff_jax.convert.sources.open import MINIATURE, open_source
from seg4diff_jax.flow import EULER, FlowSchedule
from seg4diff_jax.magnet.task import MagnetConfig, open_checkpoint
from seg4diff_jax.training.loop import RunConfig
from seg4diff_jax.training.sample_pictures import Samples
from tests.reference.random_weights import relative_error

FLOW = {"prediction_type": "flow_prediction", "use_flow_sigmas": True}
FLOW_SIGMAS = {
    "UniPC": (UniPCMultistepScheduler, {}),
    "DPM-Solver++": (DPMSolverMultistepScheduler, {}),
    "DPM-Solver++, SDE": (DPMSolverMultistepScheduler, {"algorithm_type": "sde-dpmsolver++"}),
    "DPM-Solver++, singlestep": (DPMSolverSinglestepScheduler, {"lower_order_final": True}),
    "DEIS": (DEISMultistepScheduler, {}),
    "SA-Solver": (SASolverScheduler, {}),
}
"""Samplers for many kinds of models, which follow a flow where they are told to."""
FLOW_MATCHING = {"Heun": FlowMatchHeunDiscreteScheduler, "LCM": FlowMatchLCMScheduler}
EULER_OPTIONS = {
    "stochastic Euler": {"stochastic_sampling": True},
    "Euler with Karras": {"use_karras_sigmas": True},
    "exponential Euler": {"use_exponential_sigmas": True},
    "Euler with beta": {"use_beta_sigmas": True},
    "Euler to a last level": {"shift_terminal": 0.1},
}


def others(shift: float) -> dict[str, Any]:
    """One scheduler of each kind, at that shift."""
    made = {name: kind(**FLOW, flow_shift=shift, **options) for name, (kind, options) in FLOW_SIGMAS.items()}
    made |= {name: kind(shift=shift) for name, kind in FLOW_MATCHING.items()}
    return made | {
        name: FlowMatchEulerDiscreteScheduler(shift=shift, **options) for name, options in EULER_OPTIONS.items()
    }


def saved_with(scheduler: Any, folder: Path) -> Path:
    """The miniature as diffusers saves it after its scheduler was exchanged; weights are linked."""
    shutil.copytree(MINIATURE, folder, copy_function=os.link)
    shutil.rmtree(folder / "scheduler")
    scheduler.save_pretrained(folder / "scheduler")
    index = json.loads((folder / "model_index.json").read_text())
    (folder / "model_index.json").unlink()
    index["scheduler"] = ["diffusers", type(scheduler).__name__]
    (folder / "model_index.json").write_text(json.dumps(index))
    return folder


def written(scheduler: Any) -> dict[str, Any]:
    return json.loads(scheduler.to_json_string())


@pytest.mark.parametrize("shift", [1.0, 3.0, 6.5])
@pytest.mark.parametrize("name", others(1.0))
def test_noise_levels_are_the_published_schedules_at_the_samplers_shift(name, shift):
    published = FlowMatchEulerDiscreteScheduler(shift=shift)
    published.set_timesteps(28)
    schedule = FlowSchedule.from_json(written(others(shift)[name]))
    assert relative_error(schedule.sigmas(28), published.sigmas[:-1]) <= 1e-6
    assert schedule.sampler != EULER


@pytest.mark.parametrize("name", FLOW_SIGMAS)
def test_flow_shift_is_to_those_samplers_what_shift_is_to_euler(name):
    """Their own levels lie elsewhere between 1 and 0, and are pushed towards noise as the model's are."""
    kind, options = FLOW_SIGMAS[name]
    levels = {}
    for shift in (1.0, 3.0):
        scheduler = kind(**FLOW, **options, flow_shift=shift)
        scheduler.set_timesteps(28)
        levels[shift] = np.asarray(scheduler.sigmas)[:28]
    np.testing.assert_allclose(levels[3.0], 3 * levels[1.0] / (1 + 2 * levels[1.0]), atol=1e-5)


@pytest.mark.parametrize("name", others(1.0))
def test_pictures_name_the_sampler_and_are_made_by_euler_steps_only_when_asked(name):
    scheduler = others(3.0)[name]
    schedule = FlowSchedule.from_json(written(scheduler))
    with pytest.raises(ValueError, match=rf"saved with {type(scheduler).__name__}.*sampler='euler'") as refused:
        schedule.check_sampler(None)
    assert all(option in str(refused.value) for option in EULER_OPTIONS.get(name, {}))
    schedule.check_sampler("euler")


def test_eulers_own_options_that_change_nothing_are_read():
    options = {"base_shift": 0.7, "max_shift": 2.0, "base_image_seq_len": 16, "time_shift_type": "linear"}
    assert FlowSchedule.from_json(written(FlowMatchEulerDiscreteScheduler(shift=3.0, **options))) == FlowSchedule(3.0)
    FlowSchedule(3.0).check_sampler(None)


@pytest.mark.parametrize(
    ("scheduler", "message"),
    [
        (DDIMScheduler(), "DDIMScheduler"),
        (EulerDiscreteScheduler(), "EulerDiscreteScheduler"),
        (UniPCMultistepScheduler(), "UniPCMultistepScheduler whose use_flow_sigmas is False"),
        (UniPCMultistepScheduler(use_flow_sigmas=True), "UniPCMultistepScheduler whose prediction_type is 'epsilon'"),
        (DPMSolverMultistepScheduler(prediction_type="v_prediction"), "use_flow_sigmas is False"),
        (FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True), "use_dynamic_shifting is True"),
        (FlowMatchEulerDiscreteScheduler(invert_sigmas=True), "invert_sigmas is True"),
        (UniPCMultistepScheduler(**FLOW, flow_shift=0.0), "flow_shift is 0.0; expected a positive number"),
    ],
)
def test_what_does_not_follow_a_flow_of_fixed_shift_is_refused(scheduler, message):
    with pytest.raises(ValueError, match=message):
        FlowSchedule.from_json(written(scheduler))


@pytest.mark.parametrize("sampler", [UniPCMultistepScheduler, FlowMatchEulerDiscreteScheduler])
def test_a_shift_left_of_the_scheduler_that_another_was_made_from_must_be_the_same(sampler):
    """diffusers keeps keys that it does not know, and takes 1 for those that are not given."""
    former: Any = FlowMatchEulerDiscreteScheduler(shift=3.0)
    if sampler is FlowMatchEulerDiscreteScheduler:
        former = UniPCMultistepScheduler(**FLOW, flow_shift=3.0)
    with pytest.raises(ValueError, match=r"shift 1\.0, and \w*shift 3\.0 is left"):
        FlowSchedule.from_json(written(sampler.from_config(former.config, **FLOW)))
    same = {"shift" if sampler is FlowMatchEulerDiscreteScheduler else "flow_shift": 3.0}
    assert FlowSchedule.from_json(written(sampler.from_config(former.config, **FLOW, **same))).shift == 3.0


@pytest.mark.parametrize("name", others(1.0))
def test_every_sampler_is_read_from_what_diffusers_saves(tmp_path, name):
    scheduler = others(3.0)[name]
    schedule = open_source(saved_with(scheduler, tmp_path / "saved")).schedule
    assert schedule == FlowSchedule.from_json(written(scheduler))


def test_a_sampler_survives_conversion_to_our_format_and_back(tmp_path):
    # DPM-Solver's configuration has an infinite number.
    source = saved_with(DPMSolverMultistepScheduler(**FLOW, flow_shift=4.0), tmp_path / "solver")
    convert_checkpoint(source, tmp_path / "native", components=["vae"])
    convert_checkpoint(tmp_path / "native", tmp_path / "back", to="diffusers")
    found = [open_source(folder) for folder in (source, tmp_path / "native", tmp_path / "back")]
    assert {each.schedule for each in found} == {FlowSchedule(4.0, "DPMSolverMultistepScheduler")}
    assert found[2].model_index["scheduler"] == ["diffusers", "DPMSolverMultistepScheduler"]
    assert found[2].scheduler == found[0].scheduler


def test_the_index_and_the_schedulers_own_file_name_one_class(tmp_path):
    source = saved_with(FlowMatchHeunDiscreteScheduler(shift=3.0), tmp_path / "heun")
    index = json.loads((source / "model_index.json").read_text()) | {"scheduler": ["diffusers", EULER]}
    (source / "model_index.json").write_text(json.dumps(index))
    with pytest.raises(CheckpointError, match=r"'FlowMatchEulerDiscreteScheduler', .* it is 'FlowMatchHeunDiscrete"):
        _ = open_source(source).schedule


def test_a_scheduler_that_the_index_names_is_read_or_refused(tmp_path):
    """None is taken for SD3's only where the index names none."""
    source = saved_with(FlowMatchEulerDiscreteScheduler(shift=3.0), tmp_path / "source")
    file = source / "scheduler" / "scheduler_config.json"
    file.unlink()
    with pytest.raises(CheckpointError, match=r"scheduler_config\.json: no such file; model_index\.json names a sched"):
        open_source(source)
    index = json.loads((source / "model_index.json").read_text())
    (source / "model_index.json").write_text(json.dumps(index | {"scheduler": [None, None]}))
    assert open_source(source).schedule.shift == 3.0
    file.symlink_to(tmp_path / "nowhere")
    with pytest.raises(CheckpointError, match=r"scheduler_config\.json: no such file"):
        open_source(source)
    file.unlink()
    file.mkdir()
    with pytest.raises(CheckpointError, match=r"scheduler_config\.json: cannot be read: Is a directory"):
        open_source(source)


@pytest.mark.parametrize("key", ["_class_name", "shift", "num_train_timesteps"])
def test_a_wrong_value_is_shown_in_short(key):
    with pytest.raises(ValueError, match="the scheduler") as error:
        FlowSchedule.from_json({key: "x" * 10_000})
    assert len(str(error.value)) < 500


def test_commands_and_training_say_so_before_weights_are_read(tmp_path):
    source = str(saved_with(FlowMatchHeunDiscreteScheduler(shift=3.0), tmp_path / "heun"))
    parser = ArgumentParser()
    generate.arguments(parser)
    asked = parser.parse_args(["a cat", "--model", source])
    with pytest.raises(ValueError, match="FlowMatchHeunDiscreteScheduler"):
        generate.open_checked(asked, 1)
    generate.open_checked(parser.parse_args(["a cat", "--model", source, "--sampler", "euler"]), 1)
    run = RunConfig(out=str(tmp_path / "run"), steps=1, batch_size=1)
    with pytest.raises(ValueError, match=r"samples\.sampler"):
        open_checkpoint(MagnetConfig(run, model=source, samples=Samples()))
    open_checkpoint(MagnetConfig(run, model=source, samples=Samples(sampler="euler")))


def test_euler_pictures_of_such_a_checkpoint_are_those_of_the_original(sd3):
    other = replace(sd3, schedule=FlowSchedule(3.0, "UniPCMultistepScheduler"))
    options: Any = {"size": (64, 64), "steps": 2}
    with pytest.raises(ValueError, match="UniPCMultistepScheduler"):
        other.generate("a circle", **options)
    pictures = [each.generate("a circle", sampler="euler", **options) for each in (sd3, other)]
    np.testing.assert_array_equal(*pictures)
