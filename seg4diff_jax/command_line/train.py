"""`train.py`: reads a configuration from YAML and dotted overrides, checks it, and trains."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import yaml

from seg4diff_jax.command_line.bounds import out_of_bounds
from seg4diff_jax.command_line.tasks import TASKS
from seg4diff_jax.configuration import (
    Parser,
    check_arguments,
    check_parsed,
    configuration_file,
    problems,
    read_configuration,
    refuse,
    unchecked,
)
from seg4diff_jax.magnet.task import MagnetConfig
from seg4diff_jax.numerics import settled
from seg4diff_jax.processes import join_processes
from seg4diff_jax.quoting import quoted
from seg4diff_jax.training.errors import TrainingError
from seg4diff_jax.training.loop import check, train
from seg4diff_jax.training.optimizers import schedule_problems
from seg4diff_jax.training.termination import Terminated, termination


def task_parser(task: str, prog: str, description: str) -> Parser:
    """Makes a parser for all options of one task's configuration."""
    parser = Parser(prog=prog, description=description, allow_abbrev=False)
    add: Any = parser.add_argument
    add("--config", action=configuration_file(TASKS[task].config), help="YAML file; options given after it win")
    add("--task", type=str, choices=list(TASKS), default=task, help="what is trained")
    parser.add_class_arguments(TASKS[task].config, as_positional=False)
    return parser


def make_parser(task: str) -> Parser:
    """Makes a parser for all options of one task's configuration, and for `--distributed` and `--resume`."""
    parser = task_parser(task, "train.py", f"Train the task {task}.")
    add: Any = parser.add_argument
    add(
        "--distributed",
        action="store_true",
        help="this is one process of several: they find each other through the cluster, or through "
        "JAX_COORDINATOR_ADDRESS, JAX_NUM_PROCESSES and JAX_PROCESS_ID",
    )
    add("--resume", action="store_true", help="go on from the run's last checkpoint, if it has one")
    return parser


def chosen_task(arguments: Sequence[str]) -> str:
    """Returns the task that the configuration or the command line names.

    Raises:
      ValueError: no task or an unknown one is named, or the file cannot be read.
    """
    found, where = None, ""
    for argument, following in zip(arguments, [*arguments[1:], None], strict=False):
        option, _, value = argument.partition("=")
        value = value or following
        if option == "--config" and value:
            options = read_configuration(Path(value))
            if found is None or "task" in options:
                found, where = options.get("task"), f"{value}: "
        elif option == "--task":
            found, where = value, ""
    if not isinstance(found, str) or found not in TASKS:
        raise ValueError(
            f"{where}the task is {'not named' if found is None else quoted(found)}; expected one of "
            f"{', '.join(TASKS)}, as `task:` in the file that --config names"
        )
    return found


class Parsed(NamedTuple):
    """The parsed arguments: the task's name, its configuration, the same as plain values, and two flags."""

    task: str
    config: Any
    record: dict[str, Any]
    resume: bool
    distributed: bool


def parse(arguments: Sequence[str]) -> Parsed:
    """Parses the arguments.

    Raises:
      ValueError: no task is named, or options do not fit; one message lists them all.
      SystemExit: a value has the wrong type, or an option is unknown; the message is on stderr.
    """
    task = chosen_task(arguments)
    check_arguments(arguments, TASKS[task].config)
    parser = make_parser(task)
    options = parser.parse_args(list(arguments))
    flags = {name: options.pop(name) for name in ("resume", "distributed")}
    config, record = configuration(task, parser, options, reads=True)
    return Parsed(task, config, record, **flags)


def configuration(task: str, parser: Parser, options: Any, *, reads: bool) -> tuple[Any, dict[str, Any]]:
    """Returns a task's configuration from the options that `task_parser` adds, and the same as plain values.

    Args:
      reads: whether the data will be read, so that its options are checked too.

    Raises:
      ValueError: options do not fit; the message lists them all.
    """
    options.pop("config", None)
    record = yaml.safe_load(parser.dump(options, skip_unset=False))
    kind = TASKS[task].config
    check_parsed(record, kind)
    refuse(misfits(unchecked(kind, options.as_dict()), reads=reads))
    values = parser.instantiate(options)
    values.pop("task")
    return kind(**values), record


def misfits(config: Any, *, reads: bool) -> list[str]:
    """Returns a sentence for each option of a task's configuration that does not fit."""
    found = problems(config) + schedule_problems(config.optimizer, config.run.steps)
    said = {each.partition(" is ")[0] for each in found}
    found += [each for each in out_of_bounds(config) if each.partition(" is ")[0] not in said]
    if found and reads and isinstance(config, MagnetConfig) and config.data.root:  # else reading the data reports it
        found += config.data.misplaced()
    return found


@settled()
def main(arguments: Sequence[str] | None = None) -> int:
    """Trains as the arguments say, and returns the exit status: 1 for errors, 130 after Ctrl-C, otherwise 0.

    SIGTERM gives 0. After either signal, a step in progress is finished and checkpointed first.
    """
    from seg4diff_jax.compilation import keep_compiled_programs

    try:
        task, config, record, resume, distributed = parse(sys.argv[1:] if arguments is None else arguments)
        keep_compiled_programs()
        if distributed:
            join_processes()
        check(config.run, config.optimizer)  # before the task is made, which may take long
        with termination() as stop:
            with stop.dispensable():
                made = TASKS[task].make(config)
            train(made, config.run, config.optimizer, record, resume=resume)
    except (Terminated, KeyboardInterrupt) as stopped:
        print(str(stopped) or "interrupted", file=sys.stderr)
        return 130 if isinstance(stopped, KeyboardInterrupt) else 0
    except (TrainingError, ValueError, OSError, FloatingPointError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    return 0
