"""Prompts from a file, a line each."""

from __future__ import annotations

from seg4diff_jax.data.text_files import read_lines


def prompts_of(file: str) -> list[str]:
    """Returns the lines of a file that are not blank. Raises ValueError if there are none."""
    if prompts := [line for line in read_lines(file, "a prompt a line") if line]:
        return prompts
    raise ValueError(f"{file} is empty: expected a prompt a line")
