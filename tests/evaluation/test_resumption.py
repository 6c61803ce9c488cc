"""What an interrupted evaluation keeps: of each shard its own images, as they were counted, or nothing."""

from __future__ import annotations

import io
import json
import shutil
from pathlib import Path

import numpy as np
import pytest

from seg4diff_jax.evaluation.resumption import SHARD, Progress
from seg4diff_jax.interrupted_runs import RUN
from tests.fuzz.inputs.runs import IDENTITY, IMAGES_PER_SHARD, SHARDS, make_progress

IMAGES = IMAGES_PER_SHARD * SHARDS


@pytest.fixture
def kept(tmp_path: Path) -> Path:
    """The directory of a run whose shards are all there."""
    make_progress(tmp_path)
    return tmp_path / "progress"


def finished(kept: Path) -> list[int]:
    progress = Progress(kept.parent, IDENTITY)
    size = progress.resumed()
    assert size is not None
    return progress.done(size, IMAGES)[0]


def test_whole_shards_are_finished(kept):
    assert finished(kept) == [0, 1]
    _, total = Progress(kept.parent, IDENTITY).done(IMAGES_PER_SHARD, IMAGES)
    assert total is not None
    assert total.covered() == list(range(IMAGES))


@pytest.mark.parametrize("size", [1, 2, 4, 10**18])
def test_shards_of_another_size_count_as_none(kept, size):
    described = json.loads((kept / RUN).read_text())
    (kept / RUN).write_text(json.dumps(described | {SHARD: size}))
    assert finished(kept) == []


def test_a_shard_under_another_number_counts_as_none(kept):
    (kept / "000000.npz").rename(kept / "000007.npz")
    shutil.copy(kept / "000001.npz", kept / "000000.npz")
    assert finished(kept) == [1]


def test_a_directory_in_the_place_of_a_shard_counts_as_none_and_makes_room(kept):
    (kept / "000001.npz").unlink()
    (kept / "000001.npz").mkdir()
    (kept / "000001.npz" / "file").touch()
    assert finished(kept) == [0]
    assert not (kept / "000001.npz").exists()


def test_arrays_under_each_others_names_count_as_none(kept):
    with np.load(kept / "000000.npz") as file:
        arrays = dict(file)
    arrays["counted.random"], arrays["histograms"] = arrays["histograms"], arrays["counted.random"]
    contents = io.BytesIO()
    np.savez_compressed(contents, **arrays)
    (kept / "000000.npz").write_bytes(contents.getvalue())
    assert finished(kept) == [1]


def test_values_of_other_options_are_cut_in_the_message(kept):
    described = json.loads((kept / RUN).read_text())
    for wrong in ({"seeds": ["x" * 10**5]}, {"x" * 10**5: 1}, {SHARD: "x" * 10**5}):
        (kept / RUN).write_text(json.dumps(described | wrong))
        with pytest.raises(ValueError, match="progress") as caught:
            Progress(kept.parent, IDENTITY).resumed()
        assert len(str(caught.value)) < 1000
