"""The `seg4diff` command: one file per subcommand."""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
from jsonargparse import ArgumentParser

from seg4diff_jax.command_line import segment
from seg4diff_jax.command_line.compilation import keep_compiled_programs


class Command(NamedTuple):
    """`arguments` adds a command's options to its parser; `run` takes what was parsed."""

    arguments: Callable[[ArgumentParser], None]
    run: Callable[[Any], None]
    help: str


COMMANDS: dict[str, Command] = {
    "segment": Command(segment.arguments, segment.run, "find where in an image each class is"),
}
CONVERT = "convert checkpoints from PyTorch and back: the same as python -m convert"


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one subcommand. Returns the exit status: 1, after one message on stderr, when its input is at fault."""
    arguments = list(sys.argv[1:] if arguments is None else arguments)
    if arguments[:1] == ["convert"]:
        from convert.__main__ import main as convert

        return convert(arguments[1:])
    parser = ArgumentParser(prog="seg4diff", description="Stable Diffusion 3's joint attention as a segmenter, in JAX.")
    commands = parser.add_subcommands()
    for name, command in COMMANDS.items():
        own = ArgumentParser(description=command.help)
        command.arguments(own)
        commands.add_subcommand(name, own, help=command.help)
    commands.add_subcommand("convert", ArgumentParser(), help=CONVERT)
    parsed = parser.parse_args(arguments)
    keep_compiled_programs()
    try:
        COMMANDS[parsed.subcommand].run(parsed[parsed.subcommand])
    except (ValueError, OSError) as error:  # CheckpointError and ImageError are ValueErrors
        print(f"error: {error}", file=sys.stderr)
        return 1
    except jax.errors.JaxRuntimeError as error:
        if "RESOURCE_EXHAUSTED" not in str(error):
            raise
        print("error: the device's memory is full: choose a smaller --size, or --dtype bfloat16", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return 130
    return 0
