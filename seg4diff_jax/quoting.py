"""How messages show values, texts and numbers of things that were found."""

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


def counted(count: int, what: str) -> str:
    """Returns a number of things, as in 1 prompt and 2 prompts."""
    return f"{count} {what}" if count == 1 else f"{count} {what}s"
