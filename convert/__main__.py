"""`python -m convert COMMAND ...`: one file per command."""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

from jsonargparse import ArgumentParser

from convert import checkpoint_command, lora_command, verify_command
from convert.errors import CheckpointError


class Command(NamedTuple):
    """`arguments` adds a command's options to its parser; `run` takes what was parsed."""

    arguments: Callable[[ArgumentParser], None]
    run: Callable[[Any], None]
    help: str


COMMANDS: dict[str, Command] = {
    "checkpoint": Command(
        checkpoint_command.arguments, checkpoint_command.run, "convert a checkpoint from PyTorch, or back"
    ),
    "lora": Command(lora_command.arguments, lora_command.run, "convert low-rank adapters, between any two formats"),
    "verify": Command(
        verify_command.arguments, verify_command.run, "compare PyTorch and JAX, number by number, on your weights"
    ),
}


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command. Returns the exit status: 1, after one message on stderr, when its input is at fault."""
    parser = ArgumentParser(prog="python -m convert", description="PyTorch checkpoints to JAX and back.")
    commands = parser.add_subcommands()
    for name, command in COMMANDS.items():
        own = ArgumentParser(description=command.help)
        command.arguments(own)
        commands.add_subcommand(name, own, help=command.help)
    parsed = parser.parse_args(arguments)
    try:
        COMMANDS[parsed.subcommand].run(parsed[parsed.subcommand])
    except (CheckpointError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
