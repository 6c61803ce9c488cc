"""Whatever the mesh and the processes, the same losses, evaluations, pictures and exported model."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from seg4diff_jax.parallel import MeshConfig
from seg4diff_jax.training.loop import train
from tests.reference.mesh_layouts import rows
from tests.reference.processes import finish, start, together
from tests.reference.small_training import OPTIMIZER, make_run, make_task

LAYOUTS = ["8x1x1", "1x8x1", "1x1x8", "4x2x1", "4x1x2", "2x4x1", "2x1x4", "1x4x2", "1x2x4", "2x2x2"]
IN_TWO_PROCESSES = ["8x1x1", "1x8x1", "1x1x8", "4x1x2", "1x2x4"]


def picture(run: Path) -> np.ndarray:
    (file,) = (run / "pictures").iterdir()
    return np.asarray(Image.open(file)).astype(int)


def assert_alike(found: Path, expected: Path) -> None:
    *steps, evaluation = rows(found)
    *wanted_steps, wanted = rows(expected)
    assert len({row["loss"] for row in wanted_steps}) == 4
    for row, other in zip(steps, wanted_steps, strict=True):
        assert row == pytest.approx(other, rel=2e-5), found.name
    assert evaluation.keys() == wanted.keys() > {"step", "validation/miou", "validation/velocity_loss"}
    assert evaluation["validation/velocity_loss"] == pytest.approx(wanted["validation/velocity_loss"], rel=2e-5)
    for name, value in wanted.items():  # in percent; rounding may change one of the 192 labels
        assert evaluation[name] == pytest.approx(value, abs=0.6, nan_ok=True), (found.name, name)
    assert picture(expected).std() > 10
    assert np.abs(picture(found) - picture(expected)).max() <= 1, found.name
    ours, theirs = (np.load(run / "export/transformer.npz") for run in (found, expected))
    assert set(ours) == set(theirs)
    for name, array in theirs.items():
        apart = np.abs(ours[name] - array)
        assert np.sqrt(np.mean(apart**2)) < 1e-6, (found.name, name)
        # Adam moves each number by as much, however small its gradient: of one that is all rounding even its direction
        # is chance. Four steps of 3e-3 move none by more than 1.2e-2.
        assert apart.max() < 1.2e-4, (found.name, name)


def test_two_processes_of_two_devices_give_the_figures_pictures_and_model_of_one(tmp_path):
    one = start("mesh_layouts", str(tmp_path), "1x1x1")
    finish(one, *together("mesh_layouts", str(tmp_path), "1x2x2", devices=2))
    assert_alike(tmp_path / "1x2x2", tmp_path / "1x1x1")


@pytest.mark.slow
def test_every_layout_of_eight_devices_gives_those_of_one(tmp_path):
    one = start("mesh_layouts", str(tmp_path), "1x1x1")
    finish(one, start("mesh_layouts", str(tmp_path), *LAYOUTS, devices=8))
    for layout in LAYOUTS:
        assert_alike(tmp_path / layout, tmp_path / "1x1x1")


@pytest.mark.slow
def test_every_layout_of_two_processes_gives_those_of_one(tmp_path):
    one = start("mesh_layouts", str(tmp_path), "1x1x1")
    finish(one, *together("mesh_layouts", str(tmp_path), *IN_TWO_PROCESSES, devices=4))
    for layout in IN_TWO_PROCESSES:
        assert_alike(tmp_path / layout, tmp_path / "1x1x1")


def test_a_mesh_that_does_not_fit_the_devices_is_refused(tmp_path):
    with pytest.raises(ValueError, match="fsdp x tensor is 3 x 1 = 3, which does not divide the 1 devices"):
        train(make_task(), make_run(tmp_path, mesh=MeshConfig(fsdp=3)), OPTIMIZER)
