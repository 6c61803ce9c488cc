"""From a random-access source to batches: shuffled, shared between hosts, and resumable to the item (Grain)."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable, Iterator
from multiprocessing import parent_process
from threading import Thread
from typing import Any, Protocol, runtime_checkable

import grain
import numpy as np
from absl import flags

Item = dict[str, Any]
"""Field to NumPy array or number."""
Batch = dict[str, Any]
"""Field to array with a leading axis; `index` holds the items' places in the source."""
Augment = Callable[[Item, np.random.Generator], Item]
"""An item as it is read, and random numbers, to the item as it is trained on. Goes to worker processes by pickling."""


@runtime_checkable
class DataSource(Protocol):
    """Items by their number. Worker processes get a copy by pickling."""

    def __len__(self) -> int: ...
    def __getitem__(self, index: int, /) -> Item: ...


class Numbered:
    """The source's items with a field `index` that says which each one is."""

    def __init__(self, source: DataSource):
        self.source = source

    def __len__(self) -> int:
        return len(self.source)

    def __getitem__(self, index: int) -> Item:
        return {**self.source[int(index)], "index": np.int32(index)}


class Augmented:
    """`augment` for items of `Numbered`, whose numbers it does not see."""

    def __init__(self, augment: Augment):
        self.augment = augment

    def __call__(self, item: Item, random: np.random.Generator) -> Item:
        index = item.pop("index")
        return {**self.augment(item, random), "index": index}


def training_batches(
    source: DataSource,
    *,
    batch_size: int,
    seed: int,
    augment: Augment | None = None,
    workers: int = 0,
    process: tuple[int, int] = (0, 1),
    start: int = 0,
) -> Iterator[Batch]:
    """Batches without end, each epoch in an order of its own.

    Which items make up a batch, and where in it, depends on the seed alone: hosts share each batch between them, the
    first has its first rows, and neither threads nor worker processes change the order.

    Args:
      batch_size: over all hosts.
      augment: makes each item new in every epoch: its random numbers depend on the seed, and on how many items came
        before.
      workers: processes that read; 0: threads of this one.
      process: this host's share of every batch, and how many shares there are.
      start: batches that were taken before: the first one is the one after them.

    Raises:
      ValueError: hosts cannot share a batch evenly, or an epoch has no batch.
    """
    index, count = process
    if batch_size % count:
        raise ValueError(f"batch_size is {batch_size}; expected a multiple of the {count} processes that share a batch")
    if not len(source):
        raise ValueError("the training data is empty: expected at least one item")
    items = grain.MapDataset.source(Numbered(source)).seed(seed).shuffle().repeat()
    # Before hosts take their shares: an item's random numbers are the same however many there are.
    items = items if augment is None else items.random_map(Augmented(augment))
    shares = items.batch(batch_size // count, drop_remainder=True)[index + start * count :: count]
    threads = grain.ReadOptions(num_threads=2 if workers else 4, prefetch_buffer_size=4)
    batches = shares.to_iter_dataset(threads)
    if workers:
        if not flags.FLAGS.is_parsed():
            flags.FLAGS.mark_as_parsed()  # Grain asks for options of its own, as if a program of absl's ran
        shared = grain.MultiprocessingOptions(num_workers=workers, per_worker_buffer_size=2)
        batches = batches.mp_prefetch(shared, worker_init_fn=live_with_parent)
    return iter(batches)


def live_with_parent(*_: int) -> None:
    """For worker processes: Ctrl-C is their parent's to answer, and they end when it ends, in whatever way."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    parent = parent_process()
    if parent is not None:
        Thread(target=lambda: (parent.join(), os._exit(1)), daemon=True).start()


def evaluation_batches(source: DataSource, batch_size: int) -> Iterator[tuple[Batch, int]]:
    """Every item once, in order, and how many of each batch count: the last is filled up with its last item."""
    numbered = Numbered(source)
    for start in range(0, len(source), batch_size):
        stop = min(start + batch_size, len(source))
        items = [numbered[index] for index in range(start, stop)]
        items += [items[-1]] * (batch_size - len(items))
        yield {field: np.stack([item[field] for item in items]) for field in items[0]}, stop - start
