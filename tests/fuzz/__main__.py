"""`python -m tests.fuzz`: cases of any number, counted by verdict."""

from __future__ import annotations

import argparse
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path

import tests.conftest  # noqa: F401  shapes are checked as in the tests
from tests.fuzz.table import READERS
from tests.fuzz.trial import GOOD, Trial, fingerprint, try_case


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.fuzz", description=__doc__)
    parser.add_argument("--readers", nargs="*", default=list(READERS), choices=list(READERS), metavar="READER")
    parser.add_argument("--cases", type=int, help="of each reader; default: as many as the quick tests have")
    parser.add_argument("--first", type=int, default=0, help="number of the first case")
    options = parser.parse_args()
    failed: list[Trial] = []
    for name in options.readers:
        reader, began = READERS[name], time.perf_counter()
        with tempfile.TemporaryDirectory() as folder:
            sound = Path(folder) / "sound" / "input"
            sound.mkdir(parents=True)
            reader.make(sound)
            again = Path(folder) / "again" / "input"
            expected = fingerprint(reader.read(copied(sound, again)))
            made, found = time.perf_counter(), Counter[str]()
            for case in range(options.first, options.first + (options.cases or reader.cases)):
                with tempfile.TemporaryDirectory(dir=folder) as work:
                    trial = try_case(name, reader, case, sound, expected, Path(work))
                if trial is not None:
                    found[trial.verdict] += 1
                    failed += [] if trial.verdict in GOOD else [trial]
        counts = ", ".join(f"{count} {verdict}" for verdict, count in found.most_common())
        done = time.perf_counter()
        print(f"{name}: {counts} ({made - began:.1f} s + {done - made:.1f} s)", flush=True)
    for trial in failed:
        print(trial)
    print(f"{len(failed)} failed")
    return bool(failed)


def copied(source: Path, target: Path) -> Path:
    import shutil

    return Path(shutil.copytree(source, target, symlinks=True))


if __name__ == "__main__":
    sys.exit(main())
