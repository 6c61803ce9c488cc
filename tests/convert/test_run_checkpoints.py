"""A run's checkpoints: which are kept, that damage is found, and that those of before go on."""

from __future__ import annotations

import json
import math
import shutil
import signal
from dataclasses import replace
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import SingleDeviceSharding

from seg4diff_jax.convert.errors import CheckpointError
from seg4diff_jax.convert.lora.run import read_run
from seg4diff_jax.convert.run_checkpoint import NOTES, score
from seg4diff_jax.images import read_image
from seg4diff_jax.training.checkpoints import Checkpoints, Restored
from seg4diff_jax.training.errors import TrainingError
from seg4diff_jax.training.logs import STRIP, Logs
from seg4diff_jax.training.loop import train
from seg4diff_jax.training.state import TrainState
from tests.reference.run_files import bytes_of, checkpointed, rows_of
from tests.reference.small_training import OPTIMIZER, make_run, make_task

KERNEL = jnp.asarray(np.random.default_rng(0).normal(size=(60, 10)), jnp.float32)
STATE = TrainState(jnp.int32(6), {"kernel": KERNEL}, (jnp.arange(9.0),), None, jnp.zeros(2, "uint32"))
NAN, INF = math.nan, math.inf


def write(out: Path, scores: dict[int, float | None], *, keep: int = 1) -> None:
    """Checkpoints of steps, with a score or without; a run that is resumed for each."""
    for step, value in scores.items():
        with Checkpoints(out, keep=keep, best="score") as checkpoints:
            checkpoints.save(step, STATE, 6, {"name": "x"}, None if value is None else {"score": value, "other": 1.0})


def as_bytes(state: TrainState) -> list[bytes]:
    return [np.asarray(leaf).tobytes() for leaf in jax.tree.leaves(state)]


def restored(out: Path, step: int) -> Restored:
    places = jax.tree.map(lambda _: SingleDeviceSharding(jax.devices()[0]), STATE)
    with Checkpoints(out, keep=9) as checkpoints:
        return checkpoints.restore(step, STATE, places)


# ---- the best -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "scores",
    [
        (0.3, 0.9, NAN, 0.4, NAN),
        (NAN, 0.2, 0.1, 0.0),
        (INF, 0.2, -INF, 0.1),
        (0.9, None, NAN, None),
        (-INF, NAN, None, INF),
        (0.5, 0.5, NAN, 0.1),
    ],
)
def test_the_best_is_the_last_of_the_largest_finite_scores_and_is_kept_beside_the_last(scores, tmp_path):
    write(tmp_path, dict(enumerate(scores, 1)))
    finite = [(value, step) for step, value in enumerate(scores, 1) if value is not None and math.isfinite(value)]
    assert checkpointed(tmp_path) == sorted({*[step for _, step in sorted(finite)[-1:]], len(scores)})


def test_a_score_that_is_no_number_is_told(tmp_path, capsys):
    scores = iter([{"score": 0.9}, {"score": NAN}, {"another": 1.0}, {"score": 0.4}])
    train(make_task(evaluate=lambda _: next(scores), best="score"), make_run(tmp_path, keep=1), OPTIMIZER)
    assert checkpointed(tmp_path) == [5, 20]
    said = capsys.readouterr().err
    assert "score of step 10 is nan: no finite number, so this step is never the best" in said
    assert "score of step 15 was not computed: no finite number" in said
    assert said.count("never the best") == 2


def test_an_evaluation_that_is_made_up_for_counts_for_the_best(tmp_path):
    def told(_):
        signal.raise_signal(signal.SIGTERM)
        raise AssertionError("unreachable")

    run = make_run(tmp_path, keep=1)
    train(make_task(evaluate=told, best="score"), run, OPTIMIZER)
    scores = iter([0.9, 0.1, 0.2, 0.3])
    train(make_task(evaluate=lambda _: {"score": next(scores)}, best="score"), run, OPTIMIZER, resume=True)
    assert checkpointed(tmp_path) == [5, 20]
    assert score(tmp_path / "checkpoints" / "5", "score") == 0.9, "its checksum is that of a whole record"


def test_an_export_of_the_best_checkpoint_is_never_of_a_score_that_is_no_number(tmp_path):
    for step, miou in {1: 0.5, 2: NAN, 3: INF, 4: "0.9", 5: None, 6: True, 7: 0.4}.items():
        metrics = tmp_path / "checkpoints" / str(step) / "metrics" / "metrics"
        metrics.parent.mkdir(parents=True)
        metrics.write_text(json.dumps({"miou": miou}))
    with pytest.raises(CheckpointError, match=r"checkpoints/1/config/metadata: no such file"):
        read_run(tmp_path, "best")
    shutil.rmtree(tmp_path / "checkpoints" / "1")
    shutil.rmtree(tmp_path / "checkpoints" / "7")
    with pytest.raises(CheckpointError, match="2, 3, 4, 5, 6 was evaluated to a finite mIoU: give last or a step"):
        read_run(tmp_path, "best")


@pytest.mark.parametrize("record", [{}, {"model": "m"}, {"model": "m", "lora": 3}, {"model": 3, "lora": {}}])
def test_a_run_whose_record_lacks_what_adapters_need_is_refused_by_name(record, tmp_path):
    config = tmp_path / "checkpoints" / "5" / "config" / "metadata"
    config.parent.mkdir(parents=True)
    config.write_text(json.dumps({"task": "magnet", **record}))
    with pytest.raises(CheckpointError, match=r"5/config: .*lora.rank and lora.alpha absent or of no use"):
        read_run(tmp_path, "last")


# ---- damage ---------------------------------------------------------------------------------------------------------


def test_what_is_restored_is_what_was_saved(tmp_path):
    write(tmp_path, {3: 0.5})
    found = restored(tmp_path, 3)
    assert as_bytes(found.state) == as_bytes(STATE)
    assert found[1:] == (6, {"name": "x"}, True)


@pytest.fixture(scope="module")
def two(tmp_path_factory) -> Path:
    """A run with checkpoints of steps 2 and 3."""
    out = tmp_path_factory.mktemp("two")
    write(out, {2: 0.1, 3: 0.5}, keep=2)
    return out


def flipped(file: Path, place: int) -> None:
    found = bytearray(file.read_bytes())
    found[place] ^= 4
    file.write_bytes(found)


def refused_or_whole(run: Path) -> list[str]:
    """What is said of step 3, with the way out; nothing where all that counts is what was written."""
    try:
        found = restored(run, 3)
    except TrainingError as error:
        said = str(error)
        assert f"{run}/checkpoints/3" in said
        assert f"move {run}/checkpoints/3 elsewhere: --resume then goes on from step 2" in said
        return [said]
    assert found.checked
    assert (as_bytes(found.state), found.batches, found.config) == (as_bytes(STATE), 6, {"name": "x"})
    return []


def test_a_flipped_bit_of_an_array_is_found_and_told_with_what_to_do(two, tmp_path):
    """Orbax has no checksum of these bytes: it reads other numbers."""
    run = shutil.copytree(two, tmp_path / "run")
    (numbers,) = [file for file in (run / "checkpoints" / "3").rglob("d/*") if file.stat().st_size > 1000]
    whole, silent = numbers.read_bytes(), "checkpoints/3/state is damaged: of step 3 trainable/kernel is not what was"
    seen = []
    for place in np.linspace(10, len(whole) - 10, 12).astype(int):
        flipped(numbers, place)
        seen += refused_or_whole(run)
        numbers.write_bytes(whole)
    assert sum(silent in message for message in seen) >= 6, "most of the file is the kernel"
    shutil.move(run / "checkpoints" / "3", tmp_path)
    assert restored(run, 2).checked


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")  # of readings that Orbax gives up
def test_a_file_of_arrays_cut_short_is_told_as_damage_in_one_short_sentence(two, tmp_path):
    run = shutil.copytree(two, tmp_path / "run")
    state = run / "checkpoints" / "3" / "state"
    (numbers,) = [file for file in state.rglob("d/*") if file.stat().st_size > 1000]
    for file in (numbers, state / "manifest.ocdbt", state / "_METADATA"):
        whole = file.read_bytes()
        file.write_bytes(whole[: len(whole) // 2])
        (said,) = refused_or_whole(run)
        assert said.startswith(f"{state} is damaged or cannot be read (")
        assert "this configuration" not in said
        assert "ensorStore details" not in said
        assert "tensorstore_spec" not in said
        assert len(said.replace(str(run), "")) < 600
        file.write_bytes(whole)


@pytest.mark.parametrize("name", ["data/metadata", "config/metadata", "checksums/metadata", "state/_METADATA"])
def test_a_damaged_record_of_a_checkpoint_is_refused_by_name(name, two, tmp_path):
    run = shutil.copytree(two, tmp_path / "run")
    file = run / "checkpoints" / "3" / name
    whole = file.read_bytes()
    for damaged in (whole[: len(whole) // 2], b"[]", b"{}", b"\xff"):
        file.write_bytes(damaged)
        assert refused_or_whole(run)
    for old, new in ((b"6", b"7"), (b'x"', b'y"'), (b"kernel", b"kernal")):
        file.write_bytes(whole.replace(old, new))
        assert refused_or_whole(run) or old not in whole or name == "state/_METADATA"


def test_a_damaged_score_is_named_and_not_compared(two, tmp_path):
    run = shutil.copytree(two, tmp_path / "run")
    file = run / "checkpoints" / "3" / "metrics" / "metrics"
    for damaged in (file.read_bytes().replace(b"0.5", b"0.7"), file.read_bytes()[:5], b""):
        file.write_bytes(damaged)
        with pytest.raises(TrainingError, match=r"checkpoints/3/metrics/metrics.*goes on from step 2"):
            write(run, {4: 0.2})


def test_a_score_that_is_a_directory_is_named(two, tmp_path):
    run = shutil.copytree(two, tmp_path / "run")
    file = run / "checkpoints" / "3" / "metrics" / "metrics"
    file.unlink()
    file.mkdir()
    with pytest.raises(TrainingError, match=r"checkpoints/3/metrics/metrics: cannot be read.*goes on from step 2"):
        write(run, {4: 0.2})


@pytest.mark.parametrize(
    "damaged", ['{"init_timestamp_nsecs": 1.5}', '{"commit_timestamp_nsecs": "now"}', "[]", "[" * 100_000]
)
def test_damaged_notes_of_orbax_are_named_and_what_it_reads_without_them_is_whole(damaged, two, tmp_path):
    run = shutil.copytree(two, tmp_path / "run")
    file = run / "checkpoints" / "2" / NOTES
    file.write_text(damaged)
    with pytest.raises(TrainingError, match=r"checkpoints/2/_CHECKPOINT_METADATA.*Remove the file"):
        restored(run, 2)
    file.unlink()
    assert as_bytes(restored(run, 2).state) == as_bytes(STATE)


def test_what_orbax_says_of_a_lost_file_is_told_in_some_lines(two, tmp_path):
    run = shutil.copytree(two, tmp_path / "run")
    for file in (run / "checkpoints" / "3" / "state").rglob("d/*"):
        file.unlink()
    (said,) = refused_or_whole(run)
    assert len(said) < 1500


# ---- going on -------------------------------------------------------------------------------------------------------


def stop(_):
    signal.raise_signal(signal.SIGTERM)
    return {}


OF_TWO_WORKERS = {
    "next_index_in_cycle": 1,
    "next_index_in_datasets": 2,
    "iterators_in_use_indices": [0, 1],
    "iterators_in_use_states": [{"next_index": 4}, {"next_index": 3}],
    "exhausted": [0, 0],
    "future_states": {},
}


@pytest.fixture(scope="module")
def whole(tmp_path_factory) -> list[bytes]:
    return bytes_of(train(make_task(), make_run(tmp_path_factory.mktemp("whole")), OPTIMIZER))


@pytest.mark.parametrize("position", [{"next_index": 7}, OF_TWO_WORKERS])
def test_a_run_of_before_there_were_checksums_goes_on_bit_for_bit_and_says_so(position, whole, tmp_path, capsys):
    """Its data position is Grain's, of as many workers as it had."""
    run = make_run(tmp_path, evaluate_every=7)
    train(make_task(evaluate=stop), run, OPTIMIZER)
    checkpoint = tmp_path / "checkpoints" / "7"
    shutil.rmtree(checkpoint / "checksums")
    (checkpoint / "data" / "metadata").write_text(json.dumps(position))
    assert bytes_of(train(make_task(), run, OPTIMIZER, resume=True)) == whole
    assert "step 7 has no checksums, as those of earlier versions: it is unchecked" in capsys.readouterr().err


@pytest.mark.parametrize(("before", "after"), [(0, 2), (2, 0)])
def test_a_run_goes_on_with_another_number_of_workers_bit_for_bit(before, after, whole, tmp_path):
    run = make_run(tmp_path, evaluate_every=7, workers=before)
    train(make_task(evaluate=stop), run, OPTIMIZER)
    data = json.loads((tmp_path / "checkpoints" / "7" / "data" / "metadata").read_text())
    assert data == {"batches": 7}
    assert bytes_of(train(make_task(), replace(run, workers=after), OPTIMIZER, resume=True)) == whole


def test_resuming_where_there_is_nothing_is_told(tmp_path, capsys):
    train(make_task(), make_run(tmp_path, steps=3), OPTIMIZER, resume=True)
    assert "there is no checkpoint to go on from, and the run begins anew" in capsys.readouterr().err


# ---- logs -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("torn", ['{"step": 3, "lo', '{"step"', "\0\0\0\0", "\ufffd", "3", '{"loss": 1}'])
def test_the_last_row_of_a_log_that_was_cut_off_goes(torn, tmp_path):
    rows = [{"step": 1, "loss": 0.5}, {"step": 2, "loss": 0.25}]
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows) + torn)
    with Logs(tmp_path, name="points", steps=9, start=2) as logs:
        logs.row(3, {"loss": 0.125})
    assert rows_of(tmp_path) == [*rows, {"step": 3, "loss": 0.125}]


@pytest.mark.parametrize("damaged", ['{"step": 3, "lo', '{"stop": 3}', "[3]", '{"step": "3"}', "\0", "[" * 100_000])
def test_other_damage_of_a_log_is_named_and_nothing_is_dropped(damaged, tmp_path):
    text = '{"step": 1}\n' + damaged + '\n{"step": 2}\n'
    (tmp_path / "metrics.jsonl").write_text(text)
    with pytest.raises(TrainingError, match=r"metrics.jsonl is damaged: line 2 is no row of a log"):
        Logs(tmp_path, name="points", steps=9, start=2)
    assert (tmp_path / "metrics.jsonl").read_text() == text


def test_pictures_that_are_not_a_runs_own_stay(tmp_path):
    folder = tmp_path / "pictures"
    folder.mkdir()
    for name in ("00000005.png", "00000010.png", "notes.png", ".00000010.png"):
        (folder / name).touch()
    with Logs(tmp_path, name="points", steps=20, start=5):
        pass
    assert sorted(path.name for path in folder.iterdir()) == [".00000010.png", "00000005.png", "notes.png"]


@pytest.mark.parametrize("place", ["metrics.jsonl", "pictures/00000003.png", "pictures"])
def test_what_is_in_the_way_of_a_log_is_named(place, tmp_path):
    if place == "pictures":
        (tmp_path / place).touch()
    else:
        (tmp_path / place).mkdir(parents=True)
    with pytest.raises(TrainingError, match=rf"{place}: .*(move it elsewhere|could not be written)"):  # noqa: SIM117
        with Logs(tmp_path, name="points", steps=9, start=2) as logs:
            logs.picture(3, np.zeros((4, 4, 3), np.uint8))


@pytest.mark.parametrize("damage", ["cut", "dangling", "directory"])
def test_a_former_picture_that_cannot_be_read_is_left_out_of_the_sheet_and_told_once(damage, tmp_path, capsys):
    with Logs(tmp_path, name="points", steps=9, start=0) as logs:
        for step in (1, 2):
            logs.picture(step, np.full((4, 4, 3), step, np.uint8))
    file = tmp_path / "pictures" / "00000001.png"
    contents = file.read_bytes()
    file.unlink()
    if damage == "cut":
        file.write_bytes(contents[:40])
    elif damage == "dangling":
        file.symlink_to(tmp_path / "another disk")
    else:
        file.mkdir()
    with Logs(tmp_path, name="points", steps=9, start=2) as logs:
        for step in (3, 4):
            logs.picture(step, np.full((4, 4, 3), step, np.uint8))
    sheet = read_image(tmp_path / "pictures.png")
    assert [sheet[STRIP + row * (STRIP + 4), 0, 0] for row in range(3)] == [2, 3, 4]
    assert len(sheet) == 3 * (STRIP + 4)
    said = "".join(capsys.readouterr().err.split("\n"))
    assert said.count("00000001.png") == 1
    assert "left out of pictures.png" in said
