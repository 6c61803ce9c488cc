"""Whatever befalls a file, its reader refuses it in one of our errors that names it, or reads what was written.

Each case has a number, from which all of it follows. One case again: `pytest -k "fuzz and native-17"`; others, with
counts: `python -m tests.fuzz`.
"""

from __future__ import annotations

import ast
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pytest

from seg4diff_jax.convert.errors import CheckpointError
from tests.fuzz import payload, trial
from tests.fuzz.contents import CONTENTS
from tests.fuzz.reader import Reader
from tests.fuzz.table import CALLS, ELSEWHERE, READERS
from tests.fuzz.trial import GOOD, Trial, fingerprint, try_case

ROOT = Path(__file__).parents[1]
CASES = [(name, case) for name, reader in READERS.items() for case in range(reader.cases)]
MANY = 20
"""Times as many cases has the slow test."""


class Sound(NamedTuple):
    """An undamaged input, and what is read of it."""

    root: Path
    reading: str


def prepared(reader: Reader, folder: Path) -> Sound:
    root = folder / "input"
    root.mkdir(parents=True)
    reader.make(root)
    copy = Path(shutil.copytree(root, folder / "copy" / "input", symlinks=True))
    return Sound(root, fingerprint(reader.read(copy)))


@pytest.fixture(scope="session")
def sound(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Sound]:
    """By a reader's name; each is made once."""
    made: dict[str, Sound] = {}

    def find(name: str) -> Sound:
        if name not in made:
            made[name] = prepared(READERS[name], tmp_path_factory.mktemp("sound"))
        return made[name]

    return find


@pytest.mark.parametrize(("name", "case"), CASES, ids=[f"{name}-{case}" for name, case in CASES])
def test_a_damaged_input_is_refused_by_name_or_read_as_it_was_written(name: str, case: int, sound, tmp_path: Path):
    found = try_case(name, READERS[name], case, *sound(name), tmp_path)
    assert found is None or found.verdict in GOOD, found


@pytest.mark.slow
@pytest.mark.parametrize("name", READERS)
def test_thousands_of_damaged_inputs_are_refused_or_read_as_written(name: str, sound, tmp_path: Path):
    failed: list[Trial] = []
    first = READERS[name].cases
    for case in range(first, MANY * first):
        work = tmp_path / str(case)
        work.mkdir()
        found = try_case(name, READERS[name], case, *sound(name), work)
        shutil.rmtree(work, ignore_errors=True)
        failed += [found] if found is not None and found.verdict not in GOOD else []
    assert not failed, "\n".join(map(str, failed))


@pytest.mark.parametrize("name", READERS)
def test_every_pattern_of_a_reader_finds_a_file(name: str, sound):
    root, _ = sound(name)
    absent = [pattern for pattern in READERS[name].files if not any(path.is_file() for path in root.glob(pattern))]
    assert not absent


# ---- the table is complete ------------------------------------------------------------------------------------------


def reading_modules() -> set[str]:
    """Files of ours that call something that reads a file."""
    found = set()
    for package in ("seg4diff_jax", "convert"):
        for file in (ROOT / package).rglob("*.py"):
            for node in ast.walk(ast.parse(file.read_text("utf-8"))):
                if isinstance(node, ast.Call):
                    called = node.func.attr if isinstance(node.func, ast.Attribute) else getattr(node.func, "id", "")
                    if called in CALLS:
                        found.add(file.relative_to(ROOT).as_posix())
    return found


def test_every_module_that_reads_files_is_fuzzed_or_said_why_not():
    fuzzed = {module for reader in READERS.values() for module in reader.modules}
    assert not {module for module in fuzzed if not (ROOT / module).is_file()}
    assert not fuzzed & ELSEWHERE.keys()
    assert reading_modules() - fuzzed == ELSEWHERE.keys()


# ---- the fuzzer sees what it is there to see ------------------------------------------------------------------------


def toy(read: Callable[[Path], object], holds: str = "json", **changes) -> Reader:
    make = lambda root: (root / "toy.json").write_text('{"a": 1, "b": [1, 2]}')
    return Reader(make, read, (), {"*": holds}, **changes)


def verdicts(reader: Reader, folder: Path, cases: int = 12) -> set[str]:
    ready, found = prepared(reader, folder / "sound"), set()
    for case in range(cases):
        work = folder / str(case)
        work.mkdir()
        one = try_case("toy", reader, case, *ready, work)
        found |= {one.verdict} if one is not None else set()
    return found


def once_damaged(act: Callable[[Path], object]) -> Callable[[Path], object]:
    """Reads the sound file, and does something else when it is another."""

    def read(root: Path) -> object:
        file = root / "toy.json"
        sound = file.is_file() and file.read_bytes() == b'{"a": 1, "b": [1, 2]}'
        return 1 if sound else act(root)

    return read


def refuse(message: Callable[[Path], str]) -> Callable[[Path], object]:
    def act(root: Path) -> object:
        raise CheckpointError(message(root))

    return once_damaged(act)


def test_a_refusal_must_name_the_file_in_a_few_lines(tmp_path: Path):
    assert verdicts(toy(refuse(lambda root: f"{root / 'toy.json'}: damaged")), tmp_path / "1") == {"refused"}
    assert verdicts(toy(refuse(lambda root: "something is damaged"), "summed"), tmp_path / "2") == {"unnamed"}
    assert verdicts(toy(refuse(lambda root: f"{root / 'toy.json'}{'x' * 2000}")), tmp_path / "3") == {"long"}


def test_errors_of_libraries_are_no_refusals(tmp_path: Path):
    def fail(root: Path) -> object:
        raise ValueError(f"{root / 'toy.json'}")

    assert verdicts(toy(once_damaged(fail)), tmp_path / "1") == {"traceback"}
    assert verdicts(toy(once_damaged(lambda root: np.zeros(3).reshape(2)), errors=(ValueError,)), tmp_path / "2") == {
        "traceback"
    }


def test_another_value_is_silent_where_the_damage_shows_and_sound_where_it_does_not(tmp_path: Path):
    assert verdicts(toy(once_damaged(lambda root: 2), "summed"), tmp_path / "1") == {"silent"}
    assert verdicts(toy(once_damaged(lambda root: 2), "summed", free={"": "all"}), tmp_path / "2") == {"undetectable"}
    assert verdicts(toy(once_damaged(lambda root: 1), "summed"), tmp_path / "3") == {"equal"}


def test_what_takes_too_long_or_too_much_memory_is_stopped(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    def spin(root: Path) -> object:
        while True:
            try:
                while True:
                    pass
            except Exception:
                continue

    monkeypatch.setattr(trial, "SECONDS", 0.05)
    assert verdicts(toy(once_damaged(spin)), tmp_path / "1", 2) == {"endless"}
    monkeypatch.setattr(trial, "SECONDS", 10)
    assert verdicts(toy(once_damaged(lambda root: bytes(2 * trial.MEMORY))), tmp_path / "2", 2) == {"memory"}


def test_code_that_is_run_and_files_that_are_left_are_seen(tmp_path: Path):
    assert verdicts(toy(once_damaged(lambda root: payload.leave_trace())), tmp_path / "1", 2) == {"ran"}

    def leave(root: Path) -> object:
        root.with_name("half").touch()
        raise CheckpointError(f"{root / 'toy.json'}")

    assert verdicts(toy(once_damaged(leave)), tmp_path / "2", 2) == {"leftover"}


def test_a_case_is_the_same_each_time(tmp_path: Path):
    reader = toy(once_damaged(lambda root: 2))
    ready, lines = prepared(reader, tmp_path / "sound"), []
    for again in range(2):
        for case in range(5):
            work = tmp_path / f"{again}-{case}"
            work.mkdir()
            lines.append(str(try_case("toy", reader, case, *ready, work)))
    assert lines[:5] == lines[5:]


def test_cases_go_through_every_damage_of_every_file():
    for name, reader in READERS.items():
        every = [(pattern, damage.name) for pattern, holds in reader.files.items() for damage in CONTENTS[holds]]
        drawn = [trial.draw(name, reader, case)[:2] for case in range(len(every))]
        assert sorted((pattern, damage.name) for pattern, damage in drawn) == sorted(every)
