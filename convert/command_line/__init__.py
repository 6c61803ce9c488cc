"""Runs the subcommands of `seg4diff convert` and of `seg4diff`, and prints an error as one message."""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

from jsonargparse import ArgumentParser


class Command(NamedTuple):
    """A subcommand: `arguments` adds its options to its parser; `run` takes the parsed options."""

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
    """Runs the command that the arguments name (default: the process's own arguments).

    Returns the exit status. It is 1, after one message on stderr, when the command raises an error of `at_fault`, whose
    messages say what is wrong with the command's input. It is 130 when the command is interrupted. Exits with 2 on
    unknown arguments.
    """
    name, options = _parsed(prog, description, commands, list(sys.argv[1:] if arguments is None else arguments))
    return exit_status(lambda: commands[name].run(options), at_fault)


def exit_status(run: Callable[[], None], at_fault: tuple[type[Exception], ...]) -> int:
    """Runs a command. Returns 0; 1, after one message on stderr, when it raises an error of `at_fault`; 130 when it is
    interrupted."""
    try:
        run()
    except at_fault as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return 130
    return 0


def _parsed(prog: str, description: str, commands: Mapping[str, Command], arguments: Sequence[str]) -> tuple[str, Any]:
    """Returns the command's name and its options."""
    whole = ArgumentParser(prog=prog, description=description)
    subcommands = whole.add_subcommands()
    for name, command in commands.items():
        own = ArgumentParser(prog=f"{prog} {name}", description=command.help)
        command.arguments(own)
        if arguments[:1] == [name]:  # the command's own parser writes `source` in messages, not `checkpoint.source`
            return name, own.parse_args(arguments[1:])
        subcommands.add_subcommand(name, own, help=command.help)
    parsed = whole.parse_args(arguments)
    return parsed.subcommand, parsed[parsed.subcommand]
