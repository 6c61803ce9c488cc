"""Makes batches from a random-access source with Grain: shuffled, shared between hosts, and resumable at any batch."""

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
"""An item: fields by name, NumPy arrays or numbers."""
Batch = dict[str, Any]
"""A batch: fields by name, arrays with a leading axis. `index` holds the items' numbers in the source."""
Augment = Callable[[Item, np.random.Generator], Item]
"""A function from an item and random numbers to the item for training. Worker processes get it by pickling."""


@runtime_checkable
class DataSource(Protocol):
    """A random-access source of items, by number. Worker processes get a copy by pickling."""

    def __len__(self) -> int: ...
    def __getitem__(self, index: int, /) -> Item: ...


class Numbered:
    """A source with the same items and a further field `index`, the item's number."""

    def __init__(self, source: DataSource):
        self.source = source

    def __len__(self) -> int:
        return len(self.source)

    def __getitem__(self, index: int) -> Item:
        return {**self.source[int(index)], "index": np.int32(index)}


class Augmented:
    """Applies `augment` to items of `Numbered`, without showing it the field `index`."""

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
    """Yields batches without end. Each epoch has its own random order.

    The items of a batch, and their order, depend on the seed alone, not on threads or worker processes. Hosts share
    each batch: the first host has its first rows.

    Args:
      batch_size: number of items over all hosts.
      augment: changes each item anew in every epoch. Its random numbers depend on the seed, and on the number of items
        before.
      workers: number of processes that read; 0: threads of this process.
      process: index of this host's share of every batch, and number of shares.
      start: number of batches that were taken before. The first batch is the next one.

    Raises:
      ValueError: hosts cannot share a batch evenly, or the source is empty.
    """
    index, count = process
    if batch_size % count:
        raise ValueError(f"batch_size is {batch_size}; expected a multiple of the {count} processes that share a batch")
    if not len(source):
        raise ValueError("the training data is empty: expected at least one item")
    items = grain.MapDataset.source(Numbered(source)).seed(seed).shuffle().repeat()
    # This comes before hosts take their shares, so that random numbers do not depend on the number of hosts.
    items = items if augment is None else items.random_map(Augmented(augment))
    shares = items.batch(batch_size // count, drop_remainder=True)[index + start * count :: count]
    threads = grain.ReadOptions(num_threads=2 if workers else 4, prefetch_buffer_size=4)
    batches = shares.to_iter_dataset(threads)
    if workers:
        if not flags.FLAGS.is_parsed():
            flags.FLAGS.mark_as_parsed()  # Grain reads absl flags, which fails until absl has parsed a command line
        shared = grain.MultiprocessingOptions(num_workers=workers, per_worker_buffer_size=2)
        batches = batches.mp_prefetch(shared, worker_init_fn=live_with_parent)
    return iter(batches)


def live_with_parent(*_: int) -> None:
    """Makes a worker process ignore Ctrl-C, which its parent handles, and end when the parent ends in any way."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    parent = parent_process()
    if parent is not None:
        Thread(target=lambda: (parent.join(), os._exit(1)), daemon=True).start()


def evaluation_batches(source: DataSource, batch_size: int) -> Iterator[tuple[Batch, int]]:
    """Yields batches with every item once, in order, and the number of items that count in each.

    The last batch is filled up with copies of its last item.
    """
    numbered = Numbered(source)
    for start in range(0, len(source), batch_size):
        stop = min(start + batch_size, len(source))
        items = [numbered[index] for index in range(start, stop)]
        items += [items[-1]] * (batch_size - len(items))
        yield {field: np.stack([item[field] for item in items]) for field in items[0]}, stop - start
