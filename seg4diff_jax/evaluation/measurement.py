"""Counting over a whole data set: shard by shard, shared between processes, going on where a run was interrupted.

Shards are consecutive images. In every round each process takes one, by itself on its own devices; then all hear what
was counted, and the first process keeps it.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass, field
from itertools import islice

import jax
import numpy as np
from jaxtyping import Float

from seg4diff_jax.compilation import CompilationClock
from seg4diff_jax.evaluation.batches import Example, LeftOut, Reader, asked_otherwise, assemble
from seg4diff_jax.evaluation.benchmarks import Benchmark
from seg4diff_jax.evaluation.counts import Counts, together
from seg4diff_jax.evaluation.decoys import cosines
from seg4diff_jax.evaluation.options import Decoys, EvaluationResize, Threshold
from seg4diff_jax.evaluation.readouts import Forward, Readout
from seg4diff_jax.evaluation.resumption import Progress
from seg4diff_jax.evaluation.unsupervised import Unsupervised
from seg4diff_jax.evaluation.vocabulary import questions
from seg4diff_jax.evaluation.zero_shot import NO_THRESHOLDS, Thresholds, ZeroShot
from seg4diff_jax.numerics import settled
from seg4diff_jax.pipeline import Pipeline
from seg4diff_jax.processes import gathered, in_step
from seg4diff_jax.segmentation.class_prior import ClassPrior
from seg4diff_jax.segmentation.mask_options import PAPERS_MASKS, MaskOptions
from seg4diff_jax.segmentation.unsupervised_scores import UnsupervisedProtocol

OnImages = Callable[[int, float | None], None]
"""Receives how many images are done and, now and then, their mIoU in percent: the best block's of the first pass."""
NO_PIXELS, NO_LABELS = np.zeros((0, 0, 3), np.float32), np.zeros((0, 0), np.uint8)
"""Of examples that have been counted: what is large is let go."""
TELL_EVERY = 5.0
"""Seconds between readings of the mean IoU, each of which waits for the device."""


@dataclass(frozen=True)
class Settings:
    """What is measured: all blocks and heads, at every noise level (1 clean to 28 noise), for every seed of the noise.

    Attributes:
      heads: None is the mean of all heads.
      batch_size: images, and prompts, at a time; a multiple of the devices of the model's mesh.
      prompts: kinds of prompts, see `batches.questions`; each has figures of its own. None for `unsupervised` alone.
      thresholds: scores below which pixels are background, ascending; each has figures of its own. None: no pixel is.
        `mean` alone is that of each map.
      decoys: which absent classes the prompts `decoys` and `lookalikes` name.
      metrics: figures beside mIoU, see `options.METRICS` and `options.AVERAGE_PRECISION`.
      unsupervised: protocols for segments without names; each has figures of its own.
      resize: how images come to the size that the model sees, see `options.EvaluationResize`.
      lora: what adapters the model was loaded with, for the record.
      shard_batches: after how many batches what was counted is kept.
      masks: how masks by name are fused and refined; the paper's are measured beside them.
      prior: what `masks.prior` is a power of.
    """

    blocks: tuple[int, ...]
    steps: tuple[int, ...]
    seeds: tuple[int, ...]
    batch_size: int
    heads: tuple[int | None, ...] = (None,)
    prompts: tuple[str, ...] = ("present",)
    thresholds: tuple[Threshold, ...] = ()
    decoys: Decoys = field(default_factory=Decoys)
    metrics: tuple[str, ...] = ()
    unsupervised: tuple[UnsupervisedProtocol, ...] = ()
    resize: EvaluationResize = "square"
    lora: str | None = None
    skip_unreadable: bool = False
    shard_batches: int = 8
    masks: MaskOptions = PAPERS_MASKS
    prior: ClassPrior | None = None

    @property
    def last_block(self) -> int:
        """The last block that is needed."""
        return max(*self.blocks, self.masks.refine_block or 0)

    @property
    def readouts(self) -> tuple[Readout, ...]:
        """Those of the paper's masks, then those of refined masks, if any are asked for."""
        refined = [readout._replace(refined=True) for readout in self.plain_readouts if self.masks != PAPERS_MASKS]
        return (*self.plain_readouts, *refined)

    @property
    def plain_readouts(self) -> tuple[Readout, ...]:
        return tuple(Readout(block, head) for block in self.blocks for head in self.heads)

    @property
    def thresholds_each(self) -> int:
        """How many readings each readout has."""
        return max(1, len(self.thresholds))

    @property
    def readings(self) -> tuple[tuple[Readout, Threshold | None], ...]:
        """Every readout at every threshold of the background; None where there is no threshold."""
        return tuple((readout, threshold) for readout in self.readouts for threshold in self.thresholds or (None,))


def check_batch_size(size: int, devices: int) -> None:
    """Raises ValueError when a batch cannot be shared evenly."""
    if size % devices:
        raise ValueError(f"--batch-size is {size}: expected a multiple of the {devices} devices that share a batch")


class Measurement:
    """A model on a benchmark, ready to count.

    Raises ValueError when class names do not make prompts, or the batch size does not fit the model's devices.
    """

    def __init__(self, pipe: Pipeline, benchmark: Benchmark, settings: Settings):
        self.benchmark, self.settings = benchmark, settings
        mesh = pipe.mesh
        check_batch_size(settings.batch_size, mesh.shape["data"] * mesh.shape["fsdp"] if mesh else 1)
        ahead = 2 * settings.batch_size
        how = {"how": settings.resize, "skip_unreadable": settings.skip_unreadable}
        self.reader = Reader(benchmark, pipe.view, **how, ahead=ahead)
        self.forward, by_threshold = Forward(pipe, settings.readouts, settings.masks), bool(settings.thresholds)
        chosen = {"decoys": settings.decoys, "likeness": self._likeness, "by_threshold": by_threshold}
        self.asked = questions(benchmark, pipe.tokenizers, settings.prompts, **chosen)
        classes, looks = len(benchmark.classes), {"steps": settings.steps, "seeds": settings.seeds}
        below = NO_THRESHOLDS
        if by_threshold:
            assert benchmark.background is not None, "a set without background has no thresholds of it"
            below = Thresholds(settings.thresholds, benchmark.background)
        asking = {"prompts": settings.prompts, "thresholds": below, "metrics": settings.metrics}
        self.zero_shot = ZeroShot(self.forward, classes, **looks, **asking)
        self.unsupervised = Unsupervised(
            Forward(pipe, settings.plain_readouts), classes, **looks, protocols=settings.unsupervised
        )
        self._read = time.monotonic()

    def _likeness(self, names: Sequence[str]) -> Float[np.ndarray, "classes classes"]:
        """How alike class names are to the checkpoint's own text encoders."""
        size, pooled = self.settings.batch_size, []
        for start in range(0, len(names), size):
            some = [*names[start : start + size]]
            texts = self.forward.encoded(some + some[-1:] * (size - len(some)))
            pooled.append(np.asarray(texts.pooled, np.float32)[: len(some)])
        return cosines(np.concatenate(pooled))

    @settled()
    def outcome(self, *, on_progress: OnImages = lambda done, miou: None, kept: Progress | None = None) -> Counts:
        """Count all images, in all processes: each hears of all.

        Args:
          kept: what the first process knows of a run that goes on, and where it keeps what is counted.

        Raises:
          ImageError, FolderError: an image or a label is not usable.
          ValueError: there are no images, or another process failed.
          FloatingPointError: scores are not finite.
        """
        size, former, done = self._agreed(kept)
        images, processes, me = len(self.benchmark.source), jax.process_count(), jax.process_index()
        if not images:
            raise ValueError(f"{self.benchmark.where}: expected at least one image, found none")
        shards = [range(start, min(start + size, images)) for start in range(0, images, size)]
        left = [number for number in range(len(shards)) if number not in done]
        rounds = [left[start : start + processes] for start in range(0, len(left), processes)]
        mine = [some[me] if me < len(some) else None for some in rounds]
        numbers = (image for number in mine if number is not None for image in shards[number])
        parts = [] if former is None else [former]
        with CompilationClock() as clock, closing(self.reader.read(numbers)) as items:
            for some, number in zip(rounds, mine, strict=True):
                before = together(parts) if parts else None
                own = range(0) if number is None else shards[number]
                found = self._round(items, own, clock, before, on_progress)
                if kept is not None:
                    for finished, part in zip(some, found, strict=True):
                        kept.save(finished, part)
                parts = [*([before] if before else []), *found]
        return together(parts)

    def _round(
        self,
        items: Iterator[Example | LeftOut],
        shard: range,
        clock: CompilationClock,
        before: Counts | None,
        on_progress: OnImages,
    ) -> list[Counts]:
        """What each process that has a shard in this round has counted."""
        part = in_step(lambda: self._part(islice(items, len(shard)), clock, before, on_progress) if shard else None)
        if jax.process_count() == 1:
            return [part] if part else []
        messages = gathered(part.to_bytes() if part else b"")
        return [Counts.from_bytes(message) for message in messages if message]

    def _part(
        self, items: Iterable[Example | LeftOut], clock: CompilationClock, before: Counts | None, on_progress: OnImages
    ) -> Counts:
        start, compiled, processes = time.perf_counter(), clock.seconds, jax.process_count()
        left_out: list[LeftOut] = []
        seen: list[Example] = []
        forwards = np.zeros(len(self.asked) + 1, np.int64)
        done = len(before.indices) + len(before.left_out) if before else 0
        for group in of_one_size(items, self.settings.batch_size, left_out):
            batch = assemble(group, self.settings.batch_size)
            batches = [asked_otherwise(batch, asked, self.settings.prior) for asked in self.asked.values()]
            latents = self.forward.latents(batch.pixels)
            self.zero_shot.add(latents, *batches)
            self.unsupervised.add(latents, batch)
            forwards += [*(len(each.prompts) for each in batches), bool(self.settings.unsupervised)]
            seen += [example._replace(pixels=NO_PIXELS, labels=NO_LABELS) for example in group]
            on_progress(done + processes * (len(seen) + len(left_out)), self._running_miou(before))
        counted, matched = self.zero_shot.take(), self.unsupervised.take()
        compiling = clock.seconds - compiled
        running = time.perf_counter() - start - compiling
        classes = len(self.benchmark.classes)
        return Counts(
            counted,
            self.zero_shot.further.take(),
            matched,
            np.array([example.index for example in seen], np.int64),
            np.array([example.histogram for example in seen], np.int64).reshape(-1, classes),
            np.array([example.cut_off for example in seen], np.int64),
            forwards,
            np.array([compiling, running]) / processes,
            tuple(left_out),
        )

    def _running_miou(self, before: Counts | None) -> float | None:
        if time.monotonic() - self._read < TELL_EVERY:
            return None
        if self.asked:
            score = self.zero_shot.running_miou(before.counted if before else None)
        else:
            score = self.unsupervised.running_miou(before.matched if before else None)
        self._read = time.monotonic()
        return None if score is None else 100 * score

    def _agreed(self, kept: Progress | None) -> tuple[int, Counts | None, set[int]]:
        """Images in a shard, what has been counted before, and in which shards, as the first process knows it."""

        def known() -> tuple[bytes, bytes]:
            size = kept.resumed() if kept else None
            if size is None:
                size = self._images_per_shard()
                if kept:
                    kept.begin(size)
            done, counted = kept.done(size, len(self.benchmark.source)) if kept else ([], None)
            return json.dumps([size, done]).encode(), counted.to_bytes() if counted else b""

        description, former = (gathered(message)[0] for message in in_step(known))
        size, done = json.loads(description)
        return size, Counts.from_bytes(former) if former else None, set(done)

    def _images_per_shard(self) -> int:
        """Whole batches, and at least one shard for every process where there are batches enough."""
        batch = self.settings.batch_size
        batches = -(-len(self.benchmark.source) // batch)
        return batch * max(1, min(self.settings.shard_batches, -(-batches // jax.process_count())))


def of_one_size(items: Iterable[Example | LeftOut], size: int, left_out: list[LeftOut]) -> Iterator[Sequence[Example]]:
    """Examples that are seen at one size, `size` of them at a time, the last fewer; others are put on the list."""
    begun: dict[tuple[int, ...], list[Example]] = {}
    for item in items:
        if isinstance(item, LeftOut):
            left_out.append(item)
            continue
        seen_at = item.pixels.shape
        begun.setdefault(seen_at, []).append(item)
        if len(begun[seen_at]) == size:
            yield begun.pop(seen_at)
    yield from begun.values()
