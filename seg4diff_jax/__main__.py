"""Runs `seg4diff COMMAND ...` as `python -m seg4diff_jax COMMAND ...`."""

from __future__ import annotations

import sys

from seg4diff_jax.command_line import main

if __name__ == "__main__":
    sys.exit(main())
