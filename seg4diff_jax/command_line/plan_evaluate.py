"""`seg4diff plan evaluate --topology v5e:2x2`: does an evaluation fit TPUs, and how fast can it be there?

The evaluator's programs are compiled for the slice from shapes alone. Exit status: as of `seg4diff plan`.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from typing import Any

from jsonargparse import ArgumentParser

from seg4diff_jax.planning.chips import Slice
from seg4diff_jax.planning.evaluator_plan import EvaluatorPlan, plan_evaluator
from seg4diff_jax.planning.evaluator_programs import EvaluatorConfig
from seg4diff_jax.planning.evaluator_report import lines, table

DESCRIPTION = "What an evaluation needs of a slice of TPUs that is not here."


def main(arguments: Sequence[str]) -> int:
    try:
        config, topology, markdown = parse(arguments)
        plan: EvaluatorPlan = plan_evaluator(config, Slice.parse(topology), on_program=_told)
    except (ValueError, OSError, ModuleNotFoundError, RuntimeError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print("\n".join(table([plan]) if markdown else lines(plan)))
    return 0 if plan.fits else 1


def _told(name: str, seconds: float) -> None:
    print(f"{name}: compiled in {seconds:.0f} s", file=sys.stderr)


def parse(arguments: Sequence[str]) -> tuple[EvaluatorConfig, str, bool]:
    """Returns what is evaluated, the topology, and whether a table is wanted. Exits with 2 on unknown arguments."""
    values = make_parser().parse_args(list(arguments)).as_dict()
    topology, markdown = values.pop("topology"), values.pop("markdown")
    return EvaluatorConfig(**values), topology, markdown


def make_parser() -> ArgumentParser:
    parser, default = ArgumentParser(prog="seg4diff plan evaluate", description=DESCRIPTION), EvaluatorConfig()
    add: Any = parser.add_argument
    add("--topology", type=str, default="", help="chips and their arrangement: v5e:2x2, v5p:2x2x1, v6e:1x1")
    add("--model", type=str, default=default.model, help="a published checkpoint, miniature, or a directory")
    add("--dtype", choices=["float32", "bfloat16"], default=default.dtype, help="of parameters and computation")
    add("--block", type=int, default=None, help="whose attention is read; default: the checkpoint's expert block")
    add("--size", type=int, default=None, help="side of the square in pixels; default: the trained one")
    add("--batch-size", type=int, default=None, help="images at a time on a host; default: as evaluate.py chooses it")
    add("--prompts", choices=["present", "all"], default=default.prompts, help="classes that an image is asked for")
    add("--prompts-per-image", type=int, default=1, help="prompts that these classes need")
    add("--classes", type=int, default=default.classes, help="number of classes of the set")
    add("--markdown", action="store_true", help="print a table's row")
    return parser
