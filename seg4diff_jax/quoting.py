"""How messages show values and texts that were found."""

from __future__ import annotations

from typing import Any

VALUE, TEXT = 80, 300
"""Most characters of a wrong value in a message, and of a text of a library or a file."""


def quoted(value: Any) -> str:
    """Returns a wrong value as messages show it, cut to `VALUE` characters."""
    return cut(repr(value), VALUE)


def cut(text: str, most: int = TEXT) -> str:
    """Returns the text of a library or a file as messages show it, cut to `most` characters."""
    return text if len(text) <= most else f"{text[:most]}..."
