"""Compares PyTorch and JAX on one checkpoint: the same weights, the same seeded inputs, every number.

First PyTorch runs alone, and its results go to the disk. Then JAX runs alone and is compared with them. One component
is in memory at a time, and of the transformer and of T5 one block. Each framework carries its own states through all
blocks, so errors accumulate as they do in use. Between components both frameworks take PyTorch's results, so that a row
shows where an error arises. Masks are the exception: ours come from our own latents and context, from the picture and
the prompt to the labels.
"""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import jax
import numpy as np

from seg4diff_jax.convert.errors import CheckpointError, raise_all
from seg4diff_jax.convert.progress import OnStage
from seg4diff_jax.convert.readers import Source, TorchComponent, usual_dtype
from seg4diff_jax.convert.sources.open import NothingLacks, open_source
from seg4diff_jax.convert.verify import jax_side
from seg4diff_jax.convert.verify.comparison import BOUNDS, Comparison, Recording, compare, decided_labels
from seg4diff_jax.convert.verify.inputs import SCORES_ROW, make_inputs, usual_size
from seg4diff_jax.extras import missing
from seg4diff_jax.numerics import settled

DType = Literal["float32", "bfloat16"]


@dataclass(frozen=True)
class Report:
    """The rows of a comparison, notes on what was compared, and the side of the test picture in pixels."""

    rows: list[Comparison]
    notes: list[str]
    size: int

    @property
    def failures(self) -> list[Comparison]:
        return [row for row in self.rows if not row.passed]


@settled()
def verify(
    source: str | Path,
    against: str | Path | None = None,
    *,
    size: int | None = None,
    dtype: DType = "float32",
    float64: bool = False,
    components: Sequence[str] | None = None,
    tokenizers: Path | None = None,
    variant: str | None = None,
    text_encoders: str | Path | None = None,
    on_progress: OnStage = lambda doing: None,
) -> Report:
    """Compares every component of a checkpoint in both frameworks.

    Args:
      source: what JAX reads: whatever `open_source` opens, converted on the fly.
      against: the original, which PyTorch reads, if `source` is a converted directory. Default: `source`.
      size: side of the square test picture in pixels; None: 256, or the most that the checkpoint takes.
      dtype: dtype of both computations, weights included. For bfloat16 PyTorch runs in float32 as well, which counts as
        exact.
      float64: run PyTorch in float64 as well, which then counts as exact. A row out of its fixed bound passes if
        PyTorch's own distance from exact excuses ours; see `comparison.Bounds`.
      components, tokenizers, variant: see `open_source`.
      text_encoders: see `open_source`; a second source for those that `source` or `against` lacks.
      on_progress: receives a description of the current stage.

    Raises:
      CheckpointError: a checkpoint is damaged, the two describe different models, there is no original, or PyTorch is
        not installed.
    """
    torch_side = _torch_side()
    ours, original = _open_both(
        source, against, components, {"tokenizers": tokenizers}, {"variant": variant, "text_encoders": text_encoders}
    )
    _check_original(ours, original)
    for each in (ours, original):
        _ = each.schedule, each.expert_block, each.expert_step  # each raises CheckpointError for a wrong value
    size = usual_size(ours) if size is None else size
    inputs = make_inputs(ours, size)
    rows: list[Comparison] = []
    with tempfile.TemporaryDirectory(prefix="seg4diff-verify-") as folder:

        def run_torch(dtype: str) -> tuple[Recording, Any]:
            recording = Recording(Path(folder) / dtype)
            on_stage = lambda doing: on_progress(f"PyTorch, {dtype}: {doing}")
            return recording, torch_side.run(original, inputs, dtype, recording.record, on_stage)

        wider = "float64" if float64 else {"bfloat16": "float32"}.get(dtype)
        exact = run_torch(wider)[0] if wider else None
        theirs, shared = run_torch(dtype)

        decided: list[np.ndarray] = []

        def check(what: str, array: np.ndarray) -> None:
            of_torch, of_exact = theirs.take(what), exact.take(what) if exact else None
            labels = decided.pop() if what == "masks" else None
            rows.append(compare(what, array, of_torch, of_exact, BOUNDS[dtype], labels))
            if what == SCORES_ROW:
                decided.append(decided_labels(array, of_torch))

        with _exact_products(dtype):
            jax_side.run(ours, inputs, shared, dtype, check, lambda doing: on_progress(f"JAX, {dtype}: {doing}"))
        if theirs.left:
            raise AssertionError(f"never compared: {', '.join(theirs.left)}")
    title = f"{torch_side.VERSIONS} (cpu) beside JAX {jax.__version__} ({jax.default_backend()}), {dtype}, {size} px"
    notes = [title, inputs.prompt.described]
    if inputs.transformer is not None:
        why = "the middle one: no expert block is named" if ours.expert_block is None else "the expert block"
        notes.append(f"masks from block {inputs.transformer.block}, {why}")
    if wider:
        notes.append(f"exact: PyTorch in {wider}")
    usual = [] if ours is original else [(name, _usual(ours, name), _usual(original, name)) for name in ours.configs]
    if recast := [each for each in usual if each[1] != each[2]]:
        names, (_, own, of_original) = ", ".join(name for name, *_ in recast), recast[0]
        notes.append(f"the weights' own rounding is in these errors: {names} in {own}, in the original {of_original}")
    return Report(rows, notes, size)


def _open_both(
    source: str | Path,
    against: str | Path | None,
    components: Sequence[str] | None,
    own: dict[str, Any],
    common: dict[str, Any],
) -> tuple[Source, Source]:
    """Opens what JAX reads and what PyTorch reads. One of them may need no second source."""
    if against is None:
        ours = open_source(source, components=components, **own, **common)
        return ours, ours
    alone, refused = {**common, "text_encoders": None}, None
    try:
        ours = open_source(source, components=components, **own, **common)
    except NothingLacks as error:
        ours, refused = open_source(source, components=components, **own, **alone), error
    try:
        return ours, open_source(against, components=list(ours.configs), **common)
    except NothingLacks:
        if refused is not None:
            raise refused from None
        return ours, open_source(against, components=list(ours.configs), **alone)


def _usual(source: Source, name: str) -> np.dtype:
    return usual_dtype(source.component(name))


def _torch_side() -> Any:
    try:
        from seg4diff_jax.convert.verify import torch_side
    except ModuleNotFoundError as error:
        if (message := missing(error)) is None:
            raise
        raise CheckpointError(f"verify runs PyTorch beside JAX, and {message}") from None
    return torch_side


def _exact_products(dtype: DType) -> AbstractContextManager[Any]:
    """Returns a context in which fp32 products keep all bits. Without it GPUs and TPUs round them to fewer bits."""
    return jax.default_matmul_precision("highest") if dtype == "float32" else nullcontext()


def _check_original(ours: Source, original: Source) -> None:
    converted = [name for name in original.configs if not isinstance(original.component(name), TorchComponent)]
    if converted == list(original.configs):
        raise CheckpointError(
            f"{original.origin} is a converted directory, which PyTorch cannot read: give the original that it was "
            "made from with --against"
        )
    if converted:
        raise CheckpointError(
            f"{original.origin}: {', '.join(converted)} in converted form, which PyTorch cannot read: give text "
            "encoders in their original form with --text-encoders"
        )
    raise_all(
        [
            f"{name}: {ours.origin} and {original.origin} describe different models"
            for name in ours.configs
            if ours.parsed[name] != original.parsed[name]
        ],
        "the checkpoints do not belong together",
    )
