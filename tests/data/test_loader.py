"""Batches: the same items whatever reads them, and resumable to the item."""

from __future__ import annotations

import itertools
import json
import pickle
import resource
import shutil
from contextlib import closing

import numpy as np
import pytest
from grain.sources import ArrayRecordDataSource

from seg4diff_jax.data.loader import evaluation_batches, training_batches
from seg4diff_jax.data.record_cache import RecordCache, Writer, write_cache


class Squares:
    """Item i is i squared."""

    def __init__(self, count: int = 23):
        self.count = count

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, index: int, /) -> dict:
        return {"square": np.int64(index) ** 2}


def take(batches, count: int) -> list[list[int]]:
    return [batch["index"].tolist() for batch in itertools.islice(batches, count)]


def test_every_item_comes_once_an_epoch_and_epochs_differ():
    batches = take(training_batches(Squares(24), batch_size=4, seed=0), 12)
    epochs = [list(itertools.chain(*batches[:6])), list(itertools.chain(*batches[6:]))]
    assert [sorted(epoch) for epoch in epochs] == [list(range(24))] * 2
    assert epochs[0] != epochs[1] != list(range(24))


def test_the_order_depends_on_the_seed_alone():
    first, again, other = (take(training_batches(Squares(), batch_size=4, seed=seed), 9) for seed in (3, 3, 4))
    assert first == again != other


def test_hosts_share_each_batch_between_them_and_in_their_order_have_what_one_has():
    whole = take(training_batches(Squares(), batch_size=6, seed=1), 8)
    hosts = [take(training_batches(Squares(), batch_size=6, seed=1, process=(i, 3)), 8) for i in range(3)]
    for batch, *shares in zip(whole, *hosts, strict=True):
        assert batch == list(itertools.chain(*shares))


def drawn(item: dict, random: np.random.Generator) -> dict:
    return {**item, "drawn": random.random()}


def seen(count: int, **how) -> list[tuple[list[int], list[float]]]:
    batches = training_batches(Squares(), batch_size=6, seed=0, augment=drawn, **how)
    return [(batch["index"].tolist(), batch["drawn"].tolist()) for batch in itertools.islice(batches, count)]


@pytest.mark.parametrize("process", [(0, 1), (1, 2)])
@pytest.mark.parametrize("start", [0, 1, 5, 8])
def test_batches_from_a_place_on_are_those_that_come_there(start, process):
    """Also past the end of an epoch, which has not quite four of them; what is drawn for each item too."""
    assert seen(9 - start, start=start, process=process) == seen(9, process=process)[start:]


def test_batches_from_a_place_on_are_the_same_from_worker_processes():
    assert seen(4, start=5, workers=2) == seen(9)[5:]


def test_a_batch_that_hosts_cannot_share_is_refused():
    with pytest.raises(ValueError, match="batch_size is 4; expected a multiple of the 3 processes"):
        training_batches(Squares(), batch_size=4, seed=0, process=(0, 3))


def test_evaluation_sees_every_item_once_and_fills_the_last_batch():
    batches = list(evaluation_batches(Squares(7), 3))
    assert [count for _, count in batches] == [3, 3, 1]
    assert [batch["index"].tolist() for batch, _ in batches] == [[0, 1, 2], [3, 4, 5], [6, 6, 6]]


def test_a_cache_gives_back_what_was_written_and_refuses_other_items(tmp_path):
    source, identity = Squares(7), {"made of": "squares", "count": 7}
    write_cache(
        tmp_path / "cache", ({k: v[:n] for k, v in b.items()} for b, n in evaluation_batches(source, 3)), 7, identity
    )
    cache = RecordCache(tmp_path / "cache", identity)
    assert [int(cache[i]["square"]) for i in range(len(cache))] == [i**2 for i in range(7)]
    with pytest.raises(ValueError, match="made of something else \\(count: 7, not 8\\)"):
        RecordCache(tmp_path / "cache", identity | {"count": 8})


def test_a_cache_keeps_dtypes_shapes_and_the_fields_asked_for_in_copies_too(tmp_path):
    random = np.random.default_rng(0)
    items = {"latents": random.normal(size=(5, 2, 3)).astype(np.float16), "real": random.random((5, 4)) < 0.5}
    items |= {"index": np.arange(5, dtype=np.int64)}
    in_another_order = {name: items[name][3:] for name in reversed(items)}
    write_cache(tmp_path / "a[0:2]", [{name: values[:3] for name, values in items.items()}, in_another_order], 5, {})
    for fields in (None, ["real", "latents"]):
        cache = pickle.loads(pickle.dumps(RecordCache(tmp_path / "a[0:2]", {}, fields)))
        assert len(cache) == 5
        for index in (4, 0, 2):
            item = cache[index]
            assert {*item} == {*(fields or items)}
            for name, value in item.items():
                assert value.dtype == items[name].dtype
                np.testing.assert_array_equal(value, items[name][index])


@pytest.mark.parametrize("items", [{"x": np.zeros((2, 4))}, {"y": np.zeros((2, 3))}, {"x": np.zeros((2, 3), int)}])
def test_a_cache_of_items_that_are_not_alike_never_appears(items, tmp_path):
    with pytest.raises(ValueError, match="as the first"):
        write_cache(tmp_path / "cache", [{"x": np.zeros((2, 3))}, items], 4, {})
    assert not (tmp_path / "cache").exists()


def test_what_goes_wrong_while_items_are_computed_is_told_as_it_is(tmp_path):
    def broken():
        yield {"x": np.zeros((2, 3))}
        raise RuntimeError("out of memory")

    with pytest.raises(RuntimeError, match=r"^out of memory$"):
        write_cache(tmp_path / "cache", broken(), 4, {})


REMEDY = "remove it, and it is made anew"


@pytest.fixture
def cache(tmp_path):
    """A small cache, and its values."""
    items = {"x": np.random.default_rng(0).normal(size=(4, 30)), "y": np.arange(4)}
    write_cache(tmp_path / "cache", [items], 4, {"model": 7})
    return tmp_path / "cache"


def read_all(cache) -> list[bytes]:
    records = RecordCache(cache, {"model": 7})
    return [value.tobytes() for index in range(4) for value in records[index].values()]


def test_a_cache_whose_file_is_cut_short_or_absent_is_refused_by_name(cache):
    records = cache / "items.arrayrecord"
    whole = records.read_bytes()
    records.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(ValueError, match=rf"cache cannot be read .*: {REMEDY}"):
        read_all(cache)
    records.unlink()
    with pytest.raises(ValueError, match=rf"cache cannot be read .*: {REMEDY}"):
        read_all(cache)


@pytest.mark.parametrize("part", ["identity", "dtype", "shape", "count"])
def test_what_a_cache_says_wrongly_is_cut_in_the_message(cache, part):
    file, long = cache / "items.json", "x" * 10**5
    described = json.loads(file.read_text())
    wrong = {
        "identity": {"identity": {"model": long, long: 1}},
        "dtype": {"fields": {"x": [long, [30]]}},
        "shape": {"fields": {long: ["float64", [[long]]]}},
        "count": {"count": long},
    }
    file.write_text(json.dumps(described | wrong[part]))
    with pytest.raises(ValueError, match="cache") as caught:
        read_all(cache)
    assert len(str(caught.value)) < 1000


def test_a_flipped_bit_of_a_cache_is_found_or_changes_nothing(cache):
    """The file is filled up with zeros that nobody reads."""
    records, expected = cache / "items.arrayrecord", read_all(cache)
    whole = records.read_bytes()
    used = [place for place in range(len(whole)) if whole[place]]
    found = 0
    for place in np.random.default_rng(0).choice(used, 40):
        records.write_bytes(whole[:place] + bytes([whole[place] ^ 4]) + whole[place + 1 :])
        try:
            same = read_all(cache) == expected
        except ValueError as error:
            same, found = str(cache) in str(error), found + 1
        assert same
    assert found >= 35


def rewritten(cache, order) -> None:
    """The same records in another order, in a file that is whole."""
    source = ArrayRecordDataSource(str(cache / "items.arrayrecord"))
    records = [source[index] for index in order]
    with closing(Writer(cache / "items.arrayrecord")) as writer:
        for record in records:
            writer.write(record)


@pytest.mark.parametrize(
    ("order", "said"),
    [
        ([0, 2, 1, 3], "record 1 of"),
        ([3, 1, 2, 0], "record 0 of"),
        ([0, 1, 2], "has 3 records"),
        ([0, 1, 2, 2], "3 of"),
    ],
)
def test_records_that_are_shuffled_repeated_or_missing_are_refused(order, said, cache):
    rewritten(cache, order)
    with pytest.raises(ValueError, match=rf"cache cannot be read .*{said}.*{REMEDY}"):
        read_all(cache)


def test_the_records_of_another_cache_are_refused_also_where_its_description_is_the_same(cache, tmp_path):
    write_cache(tmp_path / "other", [{"x": np.zeros((4, 30)), "y": np.arange(4)}], 4, {"model": 7})
    shutil.copy(tmp_path / "other" / "items.arrayrecord", cache)
    with pytest.raises(ValueError, match=r"record 0 of items.arrayrecord is not the one that items.json describes"):
        RecordCache(cache, {"model": 7})


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"fields": {"x": ["float64", [5, 6]], "y": ["int64", []]}}, "record 0 of"),  # as many bytes
        ({"fields": {"y": ["int64", []], "x": ["float64", [30]]}}, "record 0 of"),
        ({"fields": {"x": ["float65", [30]]}}, "float65"),
        ({"fields": {"x": ["object", [30]]}}, "field x is object"),
        ({"fields": {"x": ["float64", [-30]]}}, "field x is float64"),
        ({"fields": {"x": ["float64", 30]}}, "is damaged"),
        ({"fields": {"x": "float64"}}, "is damaged"),
        ({"fields": 3}, "is damaged"),
        ({"fields": None}, "'fields' is missing"),
        ({"identity": []}, "identity is no table"),
        ({"count": 3}, "4 records, and items.json 3"),
        ({"key": None}, "has 252 bytes, not 248"),
        ({"key": "0123456789abcdef"}, "record 0 of"),
    ],
)
def test_a_description_that_is_not_the_one_that_was_written_is_refused(change, said, cache):
    manifest = json.loads((cache / "items.json").read_text()) | change
    kept = {name: value for name, value in manifest.items() if value is not None}
    (cache / "items.json").write_text(json.dumps(kept))
    with pytest.raises(ValueError, match=rf"cache.*{said}.*made anew"):
        RecordCache(cache, {"model": 7})


def test_a_cache_of_before_there_were_checksums_is_read(cache):
    """It has neither the key nor the last four bytes of a record."""
    expected, manifest = read_all(cache), json.loads((cache / "items.json").read_text())
    source = ArrayRecordDataSource(str(cache / "items.arrayrecord"))
    records = [source[index][:-4] for index in range(4)]
    with closing(Writer(cache / "items.arrayrecord")) as writer:
        for record in records:
            writer.write(record)
    (cache / "items.json").write_text(json.dumps({"fields": manifest["fields"], "identity": manifest["identity"]}))
    assert read_all(cache) == expected


def test_a_cache_that_the_disk_does_not_take_never_appears(tmp_path):
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (64 * 1024, limits[1]))
    try:
        with pytest.raises(OSError, match="could not be written"):
            write_cache(tmp_path / "cache", [{"x": np.zeros((2, 100_000))}], 2, {})
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert not (tmp_path / "cache").exists()


def test_a_cache_that_is_cut_short_never_appears(tmp_path):
    with pytest.raises(ValueError, match="expected 5 items, found 2"):
        write_cache(tmp_path / "cache", [{"x": np.zeros((2, 3))}], 5, {})
    assert not (tmp_path / "cache").exists()
