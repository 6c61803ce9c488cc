"""Batches: the same items whatever reads them, and resumable to the item."""

from __future__ import annotations

import itertools

import numpy as np
import pytest

from seg4diff_jax.data.array_cache import ArrayCache, write_cache
from seg4diff_jax.data.loader import evaluation_batches, training_batches


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
    cache = ArrayCache(tmp_path / "cache", identity)
    assert [int(cache[i]["square"]) for i in range(len(cache))] == [i**2 for i in range(7)]
    with pytest.raises(ValueError, match="made of something else \\(count: 7, not 8\\)"):
        ArrayCache(tmp_path / "cache", identity | {"count": 8})


def test_a_cache_that_is_cut_short_never_appears(tmp_path):
    with pytest.raises(ValueError, match="expected 5 items, found 2"):
        write_cache(tmp_path / "cache", [{"x": np.zeros((2, 3))}], 5, {})
    assert not (tmp_path / "cache").exists()
