"""Displays of progress: bars at a terminal, and a few plain lines elsewhere."""

from __future__ import annotations

import io
import re

import pytest
from rich.console import Console

from seg4diff_jax import terminal
from seg4diff_jax.convert.progress import counter
from seg4diff_jax.terminal import Bar, counted_bytes, counted_pieces, stderr_console


def at_a_terminal() -> Console:
    return Console(file=io.StringIO(), force_terminal=True, width=120)


def elsewhere() -> Console:
    return Console(file=io.StringIO(), width=20)


def printed(console: Console) -> str:
    """What the console was given, without colours and moves of the cursor."""
    return re.sub(r"\x1b\[[?\d;]*[A-Za-z]", "", console.file.getvalue())  # pyright: ignore


# ---- bytes ----------------------------------------------------------------------------------------------------------


def show(console: Console) -> str:
    with counted_bytes(console, "loading [sd3]") as told:
        advance = counter(told, 4_000_000)
        for _ in range(4):
            advance(1_000_000)
    return console.file.getvalue()  # pyright: ignore


def test_progress_is_a_bar_at_a_terminal():
    shown = show(at_a_terminal())
    assert "loading [sd3]" in shown
    assert "━" in shown
    assert "4.0/4.0 MB" in shown


def test_progress_is_one_plain_line_elsewhere():
    assert show(elsewhere()) == "loading [sd3]: 4.0 MB\n"


# ---- pieces ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("remarks", [False, True])
def test_a_bar_counts_pieces_at_a_terminal_and_goes_if_it_has_no_remarks(remarks):
    console = at_a_terminal()
    with Bar(console, "scoring [all]", 4, done=1, remark="" if remarks else None, elapsed=remarks) as bar:
        assert bar.shown
        bar.update(3, "mIoU [7.5]" if remarks else None)
        bar.update(4)
    last = [line for line in printed(console).splitlines() if line][-1]
    assert "scoring [all]" in last
    assert "━" in last
    assert "4/4" in last
    assert ("mIoU [7.5]" in last) == remarks
    erased = console.file.getvalue().endswith("\x1b[2K")  # pyright: ignore
    assert erased == (not remarks)


def test_a_bar_is_nothing_elsewhere_or_where_the_console_is_quiet():
    quiet = Console(file=io.StringIO(), force_terminal=True, quiet=True)
    for console in (elsewhere(), quiet):
        with Bar(console, "scoring", 4, remark="") as bar:
            assert not bar.shown
            bar.update(4, "mIoU 7.5")
        assert printed(console) == ""


def test_pieces_are_a_bar_with_remarks_at_a_terminal():
    console = at_a_terminal()
    with counted_pieces(console, "evaluating", 4, pieces="images", remark="compiling") as advance:
        advance(4, "2.5 images/s")
    shown = printed(console)
    assert "compiling" in shown
    assert re.search(r"evaluating ━+ 4/4 2\.5 images/s", shown.splitlines()[-1])
    assert "of 4 images" not in shown


def test_pieces_are_a_line_now_and_then_elsewhere(monkeypatch):
    now = 0.0
    monkeypatch.setattr(terminal.time, "perf_counter", lambda: now)
    console = stderr_console()
    console.file = io.StringIO()
    with counted_pieces(console, "evaluating", 99, pieces="images", remark="compiling") as advance:
        for done in range(1, 9):
            now = 10.0 * done
            advance(done, f"{done}.0 images/s")
    assert printed(console) == "4 of 99 images, 4.0 images/s\n8 of 99 images, 8.0 images/s\n"
