"""Writes plans of evaluations as lines of text, and as a Markdown table."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from seg4diff_jax.planning.evaluator_plan import EvaluatorPlan, ProgramPlan
from seg4diff_jax.planning.report import GIB, count, described_chip, versions

COLUMNS = (
    "slice",
    "images a host",
    "prompts an image",
    "weights",
    "total, GiB",
    "of",
    "TFLOP an image",
    "compute, HBM, interconnect, ms an image and chip",
    "autoencoder, text, blocks, scores and counting, %",
    "images/s",
    "a chip",
)
WEIGHTS = ("transformer", "autoencoder", "text encoders")
NOTE = (
    "Each program takes the longest of its three times at the chip's documented peak, and programs run one after the "
    "other: images/s are the most that this allows, no forecast. Operations are of matrix products and convolutions, "
    "a product of fp32 counted as six of bf16. HBM: every compiled operation reads its operands and writes its results "
    "once."
)


def lines(plan: EvaluatorPlan) -> Iterator[str]:
    config, chip = plan.config, plan.slice.chip
    hosts = plan.slice.chips // plan.slice.host.chips
    asked = "classes present" if config.prompts == "present" else f"all {config.classes} classes"
    yield (
        f"{plan.slice.name}: {count(hosts, 'host')} of {count(plan.slice.host.chips, 'chip')}; {config.model}, "
        f"{config.dtype}, {config.size} px, block {config.block}"
    )
    yield (
        f"{count(config.batch_size or 0, 'image')} a host and batch, {count(config.prompts_per_image, 'prompt')} an "
        f"image: {asked}"
    )
    yield f"compiled in {plan.seconds:.0f} s by {versions()}"
    yield ""
    fullest = plan.fullest
    yield f"memory of one chip, GiB, while it runs the {fullest.name}"
    for name, size in fullest.memory.parts.items():
        yield f"  {name:<16}{size / GIB:9.3f}"
    verdict = "fits" if plan.fits else "does not fit"
    yield f"  {'total':<16}{fullest.memory.total / GIB:9.3f}  of {fullest.memory.limit / GIB:.2f}: {verdict}"
    yield ""
    yield "one batch on one chip"
    yield f"  {'':<16}{'runs':>5}{'TFLOP':>10}{'HBM, GB':>10}{'received':>10}{'least ms':>10}"
    for each in plan.programs:
        yield _program(each, each.runs * each.done, each.seconds(chip))
        for kind, times, size in each.moved.collectives if each.moved else ():
            yield f"    {kind:<20}{each.runs * size / 1e9:9.3f} GB in {each.runs * times}"
    yield f"  needed: {plan.needed / 1e12:.3f} TFLOP an image"
    yield ""
    yield "least time of a batch, ms, by one resource alone"
    for name, seconds in plan.bounds.items():
        yield f"  {name:<14}{1000 * seconds:9.1f}"
    if all(each.moved for each in plan.programs):
        rate = plan.images_per_second
        yield f"  at most {rate:.2f} images/s, {rate / plan.slice.chips:.2f} a chip"
    yield ""
    yield described_chip(chip)
    yield NOTE


def _program(each: ProgramPlan, done: float, seconds: float) -> str:
    moved = each.moved
    bytes_moved = (
        [f"{each.runs * size / 1e9:10.3f}" for size in (moved.hbm, moved.received)] if moved else ["-" * 10] * 2
    )
    return f"  {each.name:<16}{each.runs:>5}{done / 1e12:10.3f}{''.join(bytes_moved)}{1000 * seconds:10.2f}"


def table(plans: Sequence[EvaluatorPlan]) -> Iterator[str]:
    """Yields the lines of a Markdown table with one row per plan."""
    yield "| " + " | ".join(COLUMNS) + " |"
    yield "|" + "---|" * len(COLUMNS)
    for plan in plans:
        yield "| " + " | ".join(_cells(plan)) + " |"


def _cells(plan: EvaluatorPlan) -> Iterator[str]:
    memory, chips, chip = plan.fullest.memory, plan.slice.chips, plan.slice.chip
    images = plan.images / chips  # a batch has so many for each chip
    spent = {each.name: each.seconds(chip) for each in plan.programs}
    whole, counting = sum(spent.values()), ("scores", "guessers", "counting")
    parts = [("autoencoder",), ("text encoders",), ("blocks",), counting]
    yield plan.slice.name
    yield str(plan.config.batch_size)
    yield f"{plan.config.prompts_per_image}, {plan.config.prompts}"
    yield f"{sum(memory.parts[name] for name in WEIGHTS) / GIB:.2f}"
    yield f"{memory.total / GIB:.2f}" if plan.fits else f"{memory.total / GIB:.2f}: does not fit"
    yield f"{memory.limit / GIB:.2f}"
    yield f"{sum(each.runs * each.done for each in plan.programs) / images / 1e12:.2f}"
    yield ", ".join(f"{1000 * seconds / images:.1f}" for seconds in plan.bounds.values())
    yield ", ".join(f"{100 * sum(spent.get(name, 0.0) for name in names) / whole:.0f}" for names in parts)
    yield f"{plan.images_per_second:.1f}"
    yield f"{plan.images_per_second / chips:.2f}"
