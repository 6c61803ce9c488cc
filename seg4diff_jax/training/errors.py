"""The error that stops a training run."""

from __future__ import annotations


class TrainingError(RuntimeError):
    """A run cannot begin or continue. The message says why, what is intact, and what to do."""
