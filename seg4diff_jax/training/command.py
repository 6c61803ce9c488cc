"""`train.py`: a configuration from YAML and dotted overrides, checked, saved, and trained."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml
from jsonargparse import ArgumentParser, Namespace

from seg4diff_jax.training.errors import TrainingError
from seg4diff_jax.training.loop import train
from seg4diff_jax.training.tasks import TASKS


def make_parser(task: str) -> ArgumentParser:
    """All options of one task."""
    parser = ArgumentParser(prog="train.py", description=f"Train the task {task}.", allow_abbrev=False)
    add: Any = parser.add_argument
    add("--config", action="config", help="YAML file; options given after it win")
    add("--task", type=str, choices=list(TASKS), default=task)
    add("--resume", action="store_true", help="go on from the run's last checkpoint, if it has one")
    parser.add_class_arguments(TASKS[task].config, as_positional=False)
    return parser


def chosen_task(arguments: Sequence[str]) -> str:
    """The task that the configuration or the command line names. Raises ValueError when none or an unknown one is."""
    found = None
    for argument, following in zip(arguments, [*arguments[1:], None], strict=True):
        option, _, value = argument.partition("=")
        value = value or following
        if option == "--config" and value and Path(value).is_file():
            parsed = yaml.safe_load(Path(value).read_text(encoding="utf-8"))
            found = parsed.get("task", found) if isinstance(parsed, dict) else found
        elif option == "--task":
            found = value
    if found not in TASKS:
        raise ValueError(
            f"the task is {found!r}; expected one of {', '.join(TASKS)}, as `task:` in the file that --config names"
        )
    return found


def main(arguments: Sequence[str] | None = None) -> int:
    """Train what the arguments say. Returns the exit status: 0 also after SIGTERM, once a checkpoint is written."""
    arguments = list(sys.argv[1:] if arguments is None else arguments)
    try:
        task = chosen_task(arguments)
        parser = make_parser(task)
        options = parser.parse_args(arguments)
        return run(task, parser, options)
    except (TrainingError, ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1


def run(task: str, parser: ArgumentParser, options: Namespace) -> int:
    from seg4diff_jax.command_line.compilation import keep_compiled_programs

    keep_compiled_programs()
    resume = options.pop("resume")
    options.pop("config", None)
    resolved = parser.dump(options, skip_none=False)
    parsed = parser.instantiate_classes(options)
    parsed.pop("task")
    config = TASKS[task].config(**parsed)
    train(TASKS[task].make(config), config.run, config.optimizer, yaml.safe_load(resolved), resume=resume)
    return 0
