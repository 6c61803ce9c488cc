"""The commands that documents, configurations, docstrings and messages name, as a shell would read them."""

from __future__ import annotations

import ast
import re
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).parents[2]
DOCUMENTS = [
    "README.md",
    "CONTRIBUTING.md",
    *(str(path.relative_to(ROOT)) for path in sorted((ROOT / "docs").rglob("*.md"))),
    "seg4diff_jax/miniature/README.md",
]
OURS = ("python", "seg4diff", "pytest")
"""Programs that a command of ours begins with, after settings such as `PYTHONPATH=.`"""
ECHO = r"""
command_not_found_handle() { printf '%s\x1f' "$@"; printf '\x1e'; }
.ci/run() { command_not_found_handle .ci/run "$@"; }
cd() { :; }
PATH=/nowhere
"""
"""Makes a shell print the words of each program that it is asked to run, which it then does not find."""


class Command(NamedTuple):
    """Where it stands, and its words. `whole`: it can be typed as it stands, placeholders filled in."""

    place: str
    words: tuple[str, ...]
    whole: bool = True


def blocks(document: str, language: str) -> list[str]:
    """Fenced code of a language."""
    return re.findall(rf"(?ms)^```{language}\n(.*?)^```", (ROOT / document).read_text("utf-8"))


def shell(text: str) -> list[tuple[str, ...]]:
    """The words of every program that a script would run, its loops, braces, quotes and comments read by bash."""
    bash = shutil.which("bash")
    assert bash is not None
    done = subprocess.run([bash, "-c", ECHO + text], cwd="/", capture_output=True, text=True, check=False)
    assert not done.stderr, f"{text}\n{done.stderr}"
    return [tuple(each.split("\x1f")[:-1]) for each in done.stdout.split("\x1e")[:-1]]


def fenced(document: str) -> list[Command]:
    """Those of a document's blocks, and those that they hand to other machines in quotes."""
    words = shell("\n".join(blocks(document, "bash")))
    remote = [line for each in words if "--command" in each for line in shell(each[each.index("--command") + 1])]
    return [Command(document, each) for each in words + remote]


def inline(document: str) -> Iterator[Command]:
    """Those in a document's text. Names that it says stand for options are replaced by them."""
    text = _text(document)
    code = [" ".join(each.split()) for each in re.findall(r"`([^`]+)`", text)]
    stands = re.findall(r"`(\w+)` stands\s+for\s+`([^`]+)`", text)
    for line in filter(_begins_ours, code):
        for name, meaning in reversed(stands):
            line = re.sub(rf"\b{name}\b", " ".join(meaning.split()), line)
        numbered = line.startswith("seg4diff plan --") or "benchmarks/" in line
        yield from (Command(document, words, whole=numbered) for words in shell(line))


def headers() -> Iterator[Command]:
    """Those at the head of configurations and in the first docstring of modules."""
    for path in sorted((ROOT / "configs").rglob("*.yaml")):
        indented = "\n".join(re.findall(r"(?m)^#   (.*)", path.read_text("utf-8")))
        text = "\n".join(filter(_begins_ours, indented.replace("\\\n", " ").split("\n")))
        yield from (Command(str(path.relative_to(ROOT)), words) for words in shell(text))
    for path in _sources():
        lines = (ast.get_docstring(ast.parse(path.read_text("utf-8"))) or "").split("\n")
        indented = "\n".join(line.strip() for line in lines if line.startswith("    "))
        text = "\n".join(line for line in indented.replace("\\\n", " ").split("\n") if _begins_ours(line))
        yield from (Command(str(path.relative_to(ROOT)), words) for words in shell(text))


def messages() -> Iterator[Command]:
    """Those that strings of the sources name between backquotes, in help and in errors; X for what is filled in."""
    for place, text in strings("X"):
        for line in filter(_begins_ours, (" ".join(each.split()) for each in re.findall(r"`([^`]+)`", text))):
            yield from (Command(place, words, whole=False) for words in shell(line))


def strings(filled: str) -> Iterator[tuple[str, str]]:
    """File and text of every string of the sources; `filled` stands for what is filled in."""
    for path in _sources():
        for node in ast.walk(ast.parse(path.read_text("utf-8"))):
            if isinstance(node, ast.JoinedStr):
                text = "".join(str(part.value) if isinstance(part, ast.Constant) else filled for part in node.values)
            elif isinstance(node, ast.Constant) and isinstance(node.value, str):
                text = node.value
            else:
                continue
            yield str(path.relative_to(ROOT)), text


def links(document: str) -> list[str]:
    """Where links and pictures in a document's text lead, but for those that leave the project."""
    found = re.findall(r"\]\(([^()\s]+)\)", _text(document))
    return [each for each in found if not re.match(r"[a-z]+:", each)]


def anchors(document: str) -> set[str]:
    """What a link to a heading of a document may name, as GitHub makes it of the heading."""
    found: set[str] = set()
    for heading in re.findall(r"(?m)^#+ +(.+?) *$", _text(document)):
        words = re.sub(r"\[([^]]*)\]\([^)]*\)", r"\1", heading).lower()
        slug = re.sub(r"[^\w\- ]", "", words).replace(" ", "-")
        again = sum(re.fullmatch(rf"{re.escape(slug)}(-\d+)?", each) is not None for each in found)
        found.add(f"{slug}-{again}" if again else slug)
    return found


def _text(document: str) -> str:
    """Without its blocks of code."""
    return re.sub(r"(?ms)^```.*?^```", "", (ROOT / document).read_text("utf-8"))


def _begins_ours(line: str) -> bool:
    return re.match(rf"(?:[A-Z_]+=\S+ )*(?:{'|'.join(OURS)}) ", line) is not None


def _sources() -> list[Path]:
    folders = [ROOT / name for name in ("seg4diff_jax", "convert", "benchmarks")]
    return [ROOT / "evaluate.py", ROOT / "train.py", *(path for folder in folders for path in folder.rglob("*.py"))]
