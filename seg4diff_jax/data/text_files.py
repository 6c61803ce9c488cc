"""Reads text files and JSON annotations as any editor on any system saves them.

A file may begin with a byte order mark of UTF-8, UTF-16 or UTF-32; without one it is UTF-8. Line ends may be those of
Unix, Windows or old Macs, and the last line may lack one.
"""

from __future__ import annotations

import codecs
from collections.abc import Collection, Sequence
from pathlib import Path
from typing import Any

from seg4diff_jax.convert.errors import CheckpointError
from seg4diff_jax.convert.files import parse_json
from seg4diff_jax.data.errors import FolderError
from seg4diff_jax.quoting import cut, quoted

MARKS = (  # UTF-32 is before UTF-16, since its little-endian mark begins with UTF-16's
    (codecs.BOM_UTF32_LE, "utf-32-le"),
    (codecs.BOM_UTF32_BE, "utf-32-be"),
    (codecs.BOM_UTF8, "utf-8"),
    (codecs.BOM_UTF16_LE, "utf-16-le"),
    (codecs.BOM_UTF16_BE, "utf-16-be"),
)
MOST_BYTES = 2**32
"""Most bytes of a text file. The largest that is read, PASCAL Context's, has a tenth of this."""


def read_text(file: str | Path, expected: str = "text") -> str:
    r"""Returns the text of a file, with \n at the end of lines. `expected` says what it should hold, for messages.

    Raises FolderError if the file is absent, is too large or is not text; the message names the file and the line.
    """
    file = Path(file).expanduser()
    try:
        if file.stat().st_size > MOST_BYTES:
            raise FolderError(f"{file} has {file.stat().st_size} bytes; expected {expected} in at most {MOST_BYTES}")
        contents = file.read_bytes()
    except FileNotFoundError:
        raise FolderError(f"{file}: no such file; expected {expected}") from None
    except OSError as error:
        raise FolderError(f"{file} cannot be read: {error.strerror or error}; expected {expected}") from None
    mark, coding = next((each for each in MARKS if contents.startswith(each[0])), (b"", "utf-8"))
    try:
        text = contents[len(mark) :].decode(coding)
    except UnicodeDecodeError as error:
        line = _line(contents[len(mark) : len(mark) + error.start].decode(coding, "replace"))
        raise FolderError(
            f"{file}, line {line}: bytes that are no {coding.upper()}: expected {expected}; save the file in UTF-8"
        ) from None
    if "\0" in text:
        line = _line(text[: text.index("\0")])
        raise FolderError(f"{file}, line {line}: a NUL character: expected {expected}; save the file in UTF-8")
    return text.replace("\r\n", "\n").replace("\r", "\n") if "\r" in text else text


def _line(before: str) -> int:
    return 1 + before.replace("\r\n", "\n").replace("\r", "\n").count("\n")


def read_lines(file: str | Path, expected: str) -> list[str]:
    """Returns the lines of a file, without white space around them and without blank lines at the end.

    Raises as `read_text` does.
    """
    lines = [line.strip() for line in read_text(file, expected).split("\n")]
    while lines and not lines[-1]:
        lines.pop()
    return lines


# ---- annotations ----------------------------------------------------------------------------------------------------


def read_json(file: str | Path, expected: str, keep: Collection[str] = ()) -> Any:
    """Reads a JSON file.

    Args:
      expected: what the file should hold, for messages.
      keep: keys that are read. Others are dropped while parsing, which saves memory for a large file. Default: all.

    Raises FolderError if the file is absent, or is no JSON that `convert.files.parse_json` reads.
    """
    text = read_text(file, expected)
    try:
        return parse_json(text, str(file), keep=keep)
    except CheckpointError as error:
        raise FolderError(f"{error}; expected {expected}") from None


class Annotations:
    """A JSON value with its place in the file. Methods return the value, or a part of it, if it has the expected type.

    All methods raise FolderError otherwise; the message names the file and the place.
    """

    def __init__(self, value: Any, file: str | Path, expected: str, place: str = ""):
        self.value, self._file, self._expected, self._place = value, file, expected, place

    def refuse(self, problem: str) -> FolderError:
        """Makes the error that describes a problem with this value."""
        place = f", {cut(self._place.lstrip('.'))}" if self._place else ""
        return FolderError(f"{self._file}{place}: {problem}; expected {self._expected}")

    def __getitem__(self, name: str) -> Annotations:
        """Returns the value of a key of an object."""
        if not isinstance(self.value, dict):
            raise self.refuse(f"a {_kind(self.value)} where an object belongs")
        if name not in self.value:
            raise self.refuse(f"no {name!r}")
        return self._part(self.value[name], f".{name}")

    def __contains__(self, name: str) -> bool:
        return isinstance(self.value, dict) and name in self.value

    def each(self) -> list[Annotations]:
        """Returns the elements of a list."""
        if not isinstance(self.value, list):
            raise self.refuse(f"a {_kind(self.value)} where a list belongs")
        return [self._part(value, f"[{place}]") for place, value in enumerate(self.value)]

    def text(self) -> str:
        """Returns a string."""
        if not isinstance(self.value, str):
            raise self.refuse(f"a {_kind(self.value)} where text belongs")
        return self.value

    def among(self, texts: Sequence[str]) -> str:
        """Returns a string that is one of `texts`."""
        if (found := self.text()) not in texts:
            raise self.refuse(f"{quoted(found)} where one of {', '.join(texts)} belongs")
        return found

    def whole(self, least: int, most: int) -> int:
        """Returns a whole number from `least` to `most`."""
        if isinstance(self.value, bool) or not isinstance(self.value, int) or not least <= self.value <= most:
            raise self.refuse(f"{self._described()} where a whole number of {least} to {most} belongs")
        return self.value

    def number(self, least: int) -> int | float:
        """Returns a number of at least `least`."""
        if isinstance(self.value, bool) or not isinstance(self.value, int | float) or not self.value >= least:
            raise self.refuse(f"{self._described()} where a number from {least} belongs")
        return self.value

    def label(self) -> str | int:
        """Returns a string or a whole number, by which something is named."""
        if isinstance(self.value, bool) or not isinstance(self.value, str | int):
            raise self.refuse(f"{self._described()} where text or a whole number belongs")
        return self.value

    def _described(self) -> str:
        return str(self.value)[:20] if isinstance(self.value, int | float) else f"a {_kind(self.value)}"

    def _part(self, value: Any, place: str) -> Annotations:
        return Annotations(value, self._file, self._expected, self._place + place)


def unrepeated(values: Sequence[Any], of: Sequence[Annotations]) -> None:
    """Raises FolderError if a value occurs twice; the message names the place.

    Args:
      of: the annotation from which each value comes.
    """
    seen = set()
    for value, one in zip(values, of, strict=True):
        if value in seen:
            raise one.refuse(f"{quoted(value)} a second time")
        seen.add(value)


def _kind(value: Any) -> str:
    names = {dict: "table", list: "list", str: "text", bool: "truth value", type(None): "null"}
    return names.get(type(value), "number")
