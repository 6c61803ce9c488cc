"""`seg4diff plan --config FILE --topology v5e:4x4`: does this training fit a slice of TPUs, and what limits its speed?

The step that `train.py` runs is compiled for the slice from shapes alone. Neither TPUs nor weights are needed. Exit
status: 0 if the step fits, 1 if it does not, 2 if that cannot be found out. `seg4diff plan evaluate` plans evaluations,
see `plan_evaluate`.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import jax

from seg4diff_jax.command_line.tasks import TASKS
from seg4diff_jax.command_line.train import chosen_task, configuration, task_parser
from seg4diff_jax.configuration import check_arguments

SETTINGS = {
    "JAX_PLATFORMS": "cpu",
    "TPU_SKIP_MDS_QUERY": "1",  # without it libtpu looks for a TPU machine's metadata server
    "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",  # no chip is used, so other processes may load libtpu too
    "TPU_STDERR_LOG_LEVEL": "3",
    "TPU_MIN_LOG_LEVEL": "3",
    "TPU_WORKER_HOSTNAMES": "localhost",  # silences libtpu's warnings; the slice is set by name
    "TPU_ACCELERATOR_TYPE": "v5litepod-4",
}
PLANNED = "magnet"


def main(arguments: Sequence[str]) -> int:
    os.environ.update(SETTINGS)
    jax.config.update("jax_platforms", "cpu")  # JAX has already read the variable
    if list(arguments[:1]) == ["evaluate"]:
        from seg4diff_jax.command_line import plan_evaluate

        return plan_evaluate.main(arguments[1:])
    from seg4diff_jax.planning.chips import Slice
    from seg4diff_jax.planning.largest import largest_batch
    from seg4diff_jax.planning.plan import plan_magnet
    from seg4diff_jax.planning.report import lines, table

    try:
        config, options = parse(arguments)
        where = Slice.parse(options["topology"])
        plan = lambda batch: plan_magnet(replace(config, run=replace(config.run, batch_size=batch)), where)
        if options["largest_batch"]:
            unit = max(1, where.chips // max(1, config.run.mesh.tensor))
            tried = list(_printing_each(largest_batch(plan, unit)))
            plans = [
                max((each for each in tried if each.memory.fits), key=lambda each: each.batch_size, default=tried[0])
            ]
        else:
            plans = [plan(config.run.batch_size)]
    except (ValueError, OSError, ModuleNotFoundError, RuntimeError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print("\n".join(table(plans) if options["markdown"] else lines(plans[0])))
    return 0 if plans[0].memory.fits else 1


def parse(arguments: Sequence[str]) -> tuple[Any, dict[str, Any]]:
    """Returns the task's configuration, and this command's own options by name."""
    task = chosen_task(arguments)
    if task != PLANNED:
        raise ValueError(f"the task is {task}; plans are made for {PLANNED}")
    check_arguments(arguments, TASKS[task].config)
    parser = task_parser(task, "seg4diff plan", "What a training run needs of a slice of TPUs that is not here.")
    add: Any = parser.add_argument
    add("--topology", type=str, default="", help="chips and their arrangement: v5e:4x4, v5p:2x2x1, v6e:8x8")
    add("--largest-batch", action="store_true", help="find the largest batch that fits instead of run.batch_size")
    add("--markdown", action="store_true", help="print a table's row")
    parsed = parser.parse_args(list(arguments))
    own = {name: parsed.pop(name) for name in ("topology", "largest_batch", "markdown")}
    return configuration(task, parser, parsed, reads=False)[0], own


def _printing_each(plans: Any) -> Any:
    for plan in plans:
        verdict = "fits" if plan.memory.fits else "does not fit"
        print(f"batch {plan.batch_size}: {plan.memory.total / 2**30:.2f} GiB, {verdict}", file=sys.stderr)
        yield plan
