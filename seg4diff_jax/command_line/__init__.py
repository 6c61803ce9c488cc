"""The `seg4diff` command: one file per subcommand."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from importlib import import_module

from seg4diff_jax.command_line import (
    analyze,
    class_prior,
    clip_score,
    compare,
    generate,
    perturb,
    reproduce,
    scenes,
    segment,
    segment_unsupervised,
)
from seg4diff_jax.convert.command_line import Command, run_command
from seg4diff_jax.extras import missing
from seg4diff_jax.numerics import settled

DESCRIPTION = "Stable Diffusion 3's joint attention as a segmenter, in JAX."
COMMANDS: dict[str, Command] = {
    "segment": Command(segment.arguments, segment.run, "find where in an image each class is"),
    "segment-unsupervised": Command(
        segment_unsupervised.arguments, segment_unsupervised.run, "divide an image into segments without names"
    ),
    "class-prior": Command(
        class_prior.arguments, class_prior.run, "how much attention each class's words draw anywhere"
    ),
    "generate": Command(generate.arguments, generate.run, "make pictures of prompts"),
    "clip-score": Command(clip_score.arguments, clip_score.run, "score pictures against their prompts by CLIP"),
    "analyze": Command(analyze.arguments, analyze.run, "look at the attention on an image"),
    "perturb": Command(perturb.arguments, perturb.run, "make pictures with one block perturbed, and score them"),
    "compare": Command(compare.arguments, compare.run, "hold two evaluations against each other"),
    "reproduce": Command(reproduce.arguments, reproduce.run, "run the whole paper in small, on one page"),
    "scenes": Command(scenes.arguments, scenes.run, "write the synthetic world as a folder of labelled images"),
}
PROGRAMS = {
    "evaluate": ("seg4diff_jax.command_line.evaluate", "score masks on labelled images: evaluate.py"),
    "train": ("seg4diff_jax.command_line.train", "train MAGNET's adapters, or the miniature: train.py"),
    "plan": ("seg4diff_jax.command_line.plan", "what training, or evaluation, needs of TPUs that are not here"),
    "convert": ("seg4diff_jax.convert.__main__", "checkpoints from PyTorch and back"),
}
"""Subcommands with parsers of their own: the module whose `main` takes the arguments, and the help text."""
EXTRAS = {"reproduce": "train"}
"""The extra of a subcommand that needs more than the first that brings a missing library."""
AT_FAULT = (ValueError, OSError, MemoryError, FloatingPointError)
"""Errors whose messages are shown to the user. CheckpointError and ImageError are ValueErrors."""


@settled()
def main(arguments: Sequence[str] | None = None) -> int:
    """Runs one subcommand and returns the exit status.

    The status is 1, after one message on stderr, if the input is wrong or an extra of this package is not installed.
    """
    arguments = list(sys.argv[1:] if arguments is None else arguments)
    try:
        return _run(arguments)
    except ModuleNotFoundError as error:
        program = arguments[0] if arguments and arguments[0] in PROGRAMS else None
        wanted = program or EXTRAS.get(arguments[0] if arguments else "")
        if (message := missing(error, wanted)) is None:
            raise
        print(f"error: {message}", file=sys.stderr)
        return 2 if program == "plan" else 1  # 1 is its answer that a training does not fit


def _run(arguments: Sequence[str]) -> int:
    if arguments and arguments[0] in PROGRAMS:
        return import_module(PROGRAMS[arguments[0]][0]).main(arguments[1:])
    listed = {name: Command(lambda parser: None, lambda options: None, help) for name, (_, help) in PROGRAMS.items()}
    return run_command("seg4diff", DESCRIPTION, COMMANDS | listed, arguments, at_fault=AT_FAULT)
