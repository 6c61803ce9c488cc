"""The frame of `python -m convert` and of `seg4diff`: subcommands, and errors told in one message."""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

from jsonargparse import ArgumentParser


class Command(NamedTuple):
    """`arguments` adds a command's options to its parser; `run` takes what was parsed."""

    arguments: Callable[[ArgumentParser], None]
    run: Callable[[Any], None]
    help: str


def run_command(
    prog: str,
    description: str,
    commands: Mapping[str, Command],
    arguments: Sequence[str] | None,
    at_fault: tuple[type[Exception], ...],
) -> int:
    """Run the command that the arguments name (default: the process's own).

    Returns the exit status: 1, after one message on stderr, when the command raises an error of `at_fault`, whose
    messages say what is wrong with its input; 130 when it is interrupted. Exits with 2 on arguments that it lacks.
    """
    parser = ArgumentParser(prog=prog, description=description)
    subcommands = parser.add_subcommands()
    for name, command in commands.items():
        own = ArgumentParser(description=command.help)
        command.arguments(own)
        subcommands.add_subcommand(name, own, help=command.help)
    parsed = parser.parse_args(arguments)
    try:
        commands[parsed.subcommand].run(parsed[parsed.subcommand])
    except at_fault as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return 130
    return 0
