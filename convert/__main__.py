"""The program `seg4diff convert COMMAND ...`, in a clone also `python -m convert COMMAND ...`."""

from __future__ import annotations

import sys
from collections.abc import Sequence

from seg4diff_jax.convert.command_line import Command, run_command
from seg4diff_jax.convert.command_line import checkpoint as checkpoint_command
from seg4diff_jax.convert.command_line import lora as lora_command
from seg4diff_jax.convert.command_line import verify as verify_command
from seg4diff_jax.convert.errors import CheckpointError

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
    """Runs one command. Returns the exit status: 1, after one message on stderr, if the command's input is at fault."""
    description = "PyTorch checkpoints to JAX and back."
    return run_command("seg4diff convert", description, COMMANDS, arguments, at_fault=(CheckpointError, OSError))


if __name__ == "__main__":
    sys.exit(main())
