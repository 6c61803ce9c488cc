"""The error of a folder or a file of data."""

from __future__ import annotations


class FolderError(ValueError):
    """A folder or one of its files cannot be used; the message names it."""
