"""Batches: the same items whatever reads them, and resumable to the item."""

from __future__ import annotations

import itertools
import pickle
import resource

import numpy as np
import pytest

from seg4diff_jax.data.loader import evaluation_batches, training_batches
from seg4diff_jax.data.record_cache import RecordCache, write_cache


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


def test_an_iterator_goes_on_where_its_state_was_taken():
    batches = training_batches(Squares(), batch_size=4, seed=0)
    take(batches, 5)
    state = batches.get_state()
    expected = take(batches, 7)
    again = training_batches(Squares(), batch_size=4, seed=0)
    again.set_state(state)
    assert take(again, 7) == expected


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


def test_a_damaged_cache_is_refused_by_name(tmp_path):
    write_cache(tmp_path / "cache", [{"x": np.random.default_rng(0).normal(size=(4, 30))}], 4, {})
    records = tmp_path / "cache" / "items.arrayrecord"
    whole = records.read_bytes()
    records.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(ValueError, match=r"cache cannot be read .*: remove it, and it is made anew"):
        RecordCache(tmp_path / "cache", {})[3]
    records.unlink()
    with pytest.raises(ValueError, match=r"cache cannot be read .*: remove it, and it is made anew"):
        RecordCache(tmp_path / "cache", {})[3]


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
