"""Event files, as TensorBoard's own reader reads them."""

from __future__ import annotations

import io
import json
import math
import resource
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from seg4diff_jax.training.logs import Logs
from seg4diff_jax.training.tensorboard import EventFile


def read(directory: Path) -> EventAccumulator:
    return EventAccumulator(str(directory), size_guidance={"scalars": 0, "images": 0}).Reload()


def scalars(directory: Path) -> dict[str, list[tuple[int, float]]]:
    """By tag, step and value of each."""
    events = read(directory)
    return {tag: [(one.step, one.value) for one in events.Scalars(tag)] for tag in events.Tags()["scalars"]}


def log(directory: Path, steps: range, scale: float) -> None:
    with Logs(directory, name="points", steps=20, start=steps.start - 1) as logs:
        for step in steps:
            logs.row(step, {"loss": scale / step, "validation/miou/9@0.3": scale * step})


def test_a_row_s_values_are_there_under_its_names(tmp_path):
    log(tmp_path, range(1, 6), 3.0)
    rows = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    found = scalars(tmp_path)
    assert found.keys() == {"loss", "validation/miou/9@0.3"}
    for tag, values in found.items():
        assert values == [(row["step"], np.float32(row[tag])) for row in rows]


def test_no_step_is_there_twice_when_a_run_is_resumed(tmp_path):
    log(tmp_path, range(1, 9), 3.0)
    log(tmp_path, range(6, 11), 5.0)
    expected = [(step, np.float32((3.0 if step < 6 else 5.0) / step)) for step in range(1, 11)]
    assert scalars(tmp_path)["loss"] == expected


def test_runs_of_one_second_do_not_overwrite_each_other(tmp_path):
    for step in range(1, 5):
        log(tmp_path, range(step, step + 1), 3.0)
    assert [step for step, _ in scalars(tmp_path)["loss"]] == [1, 2, 3, 4]


def test_numbers_that_are_not_finite_are_kept_as_such(tmp_path):
    with Logs(tmp_path, name="points", steps=20, start=0) as logs:
        logs.row(1, {"loss": math.inf, "miou": math.nan})
    found = scalars(tmp_path)
    assert found["loss"] == [(1, math.inf)]
    assert math.isnan(found["miou"][0][1])


def test_a_picture_is_there_as_it_was_drawn(tmp_path):
    pixels = np.random.default_rng(0).integers(0, 256, (7, 9, 3), np.uint8)
    with Logs(tmp_path, name="points", steps=20, start=0) as logs:
        logs.picture(3, pixels)
    (event,) = read(tmp_path).Images("pictures")
    assert (event.step, event.height, event.width) == (3, 7, 9)
    np.testing.assert_array_equal(np.asarray(Image.open(io.BytesIO(event.encoded_image_string))), pixels)


def test_what_was_logged_is_on_the_disk_before_the_run_ends(tmp_path):
    with Logs(tmp_path, name="points", steps=20, start=0) as logs:
        logs.row(1, {"loss": 0.5})
        assert scalars(tmp_path) == {"loss": [(1, 0.5)]}


def test_a_full_disk_is_told_and_not_waited_for(tmp_path):
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    events = EventFile(tmp_path)

    def fill() -> None:
        for step in range(1, 1000):
            events.scalars(step, {"loss": 0.5})

    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (4 * 1024, hard))
        with pytest.raises(OSError, match="too large"):
            fill()
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    written = [step for step, _ in scalars(tmp_path)["loss"]]
    assert written == list(range(1, len(written) + 1))
    assert len(written) > 50
