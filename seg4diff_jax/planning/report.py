"""Writes plans as lines of text, and as a Markdown table."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from importlib.metadata import PackageNotFoundError, version

from seg4diff_jax.planning.chips import Chip
from seg4diff_jax.planning.plan import Plan

GIB = 2**30
COLUMNS = (
    "slice",
    "data x fsdp x tensor",
    "batch",
    "weights",
    "adapters, optimizer",
    "temporaries",
    "total, GiB",
    "of",
    "TFLOP",
    "HBM, GB",
    "received, GB",
    "bounds: compute, HBM, interconnect, ms",
)
NOTE = (
    "Per chip and step. Operations are of matrix products and convolutions. HBM: every compiled operation reads its "
    "operands and writes its results once. The times are what each takes at the chip's documented peak, the other two "
    "left out: none is a forecast."
)


def lines(plan: Plan) -> Iterator[str]:
    memory, chips = plan.memory, plan.slice.chips
    layout = " x ".join(map(str, plan.layout))
    yield f"{plan.slice.name}: {count(chips, 'chip')}, data x fsdp x tensor {layout}, batch {plan.batch_size}"
    yield f"{'compiled in' if plan.moved else 'given up by the compiler after'} {plan.seconds:.0f} s by {versions()}"
    yield ""
    yield "memory of one chip, GiB"
    for name, size in memory.parts.items():
        yield f"  {name:<16}{size / GIB:9.3f}"
    verdict = "fits" if memory.fits else "does not fit"
    yield f"  {'total':<16}{memory.total / GIB:9.3f}  of {memory.limit / GIB:.2f}: {verdict}"
    yield ""
    yield "one step on one chip"
    yield f"  operations    {plan.done / 1e12:9.3f} TFLOP, {plan.needed / 1e12:.3f} of them for the gradients alone"
    if plan.moved is not None:
        yield f"  HBM           {plan.moved.hbm / 1e9:9.3f} GB"
        yield f"  interconnect  {plan.moved.received / 1e9:9.3f} GB received"
        for each in plan.moved.collectives:
            yield f"    {each.kind:<20}{each.bytes / 1e9:9.3f} GB in {each.times}"
    yield ""
    yield "least time of a step, ms"
    for name, seconds in plan.bounds.items():
        yield f"  {name:<14}{1000 * seconds:9.1f}"
    if plan.moved is not None:
        slowest = max(plan.bounds, key=lambda name: plan.bounds[name])
        rate = plan.batch_size / plan.bounds[slowest]
        yield f"  {slowest} dominates: at most {rate:.2f} images/s, {rate / chips:.2f} a chip"
    yield ""
    yield described_chip(plan.slice.chip)
    yield NOTE


def table(plans: Sequence[Plan]) -> Iterator[str]:
    """Yields the lines of a Markdown table with one row per plan."""
    yield "| " + " | ".join(COLUMNS) + " |"
    yield "|" + "---|" * len(COLUMNS)
    for plan in plans:
        yield "| " + " | ".join(_cells(plan)) + " |"


def _cells(plan: Plan) -> Iterator[str]:
    parts = plan.memory.parts
    gib = lambda *names: f"{sum(parts.get(name, 0.0) for name in names) / GIB:.2f}"
    yield plan.slice.name
    yield " x ".join(map(str, plan.layout))
    yield str(plan.batch_size)
    yield gib("base", "encoders")
    yield gib("adapters", "optimizer")
    yield gib("temporaries") if plan.moved else "-"
    yield f"{plan.memory.total / GIB:.2f}" if plan.memory.fits else f"{plan.memory.total / GIB:.2f}: does not fit"
    yield f"{plan.memory.limit / GIB:.2f}"
    yield f"{plan.done / 1e12:.1f}"
    yield f"{plan.moved.hbm / 1e9:.1f}" if plan.moved else "-"
    yield f"{plan.moved.received / 1e9:.2f}" if plan.moved else "-"
    yield ", ".join(f"{1000 * seconds:.1f}" for seconds in plan.bounds.values())


def described_chip(chip: Chip) -> str:
    return (
        f"{chip.name}: {chip.flops / 1e12:.0f} TFLOP/s bf16, {chip.memory / GIB:.0f} GiB at "
        f"{chip.memory_rate / 1e9:.0f} GB/s, {chip.link_rate / 1e9:.0f} GB/s each way over the "
        f"interconnect ({chip.source})"
    )


def versions() -> str:
    return ", ".join(f"{package} {_version(package)}" for package in ("libtpu", "jax"))


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:  # libtpu may be a plain file that TPU_LIBRARY_PATH names
        return "of unknown version"


def count(number: int, what: str) -> str:
    return f"{number} {what}{'' if number == 1 else 's'}"
