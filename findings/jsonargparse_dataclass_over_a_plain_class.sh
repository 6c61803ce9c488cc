#!/usr/bin/env bash
# A dataclass section that inherits from a class that is no dataclass stops having options of its own.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
"${PYTHON:-python3}" -m venv "$work/venv"
"$work/venv/bin/pip" install --quiet "jsonargparse[signatures]==4.53.0"
cd "$work"
"$work/venv/bin/python" - <<'EOF'
from dataclasses import dataclass, field
from importlib.metadata import version

from jsonargparse import ArgumentParser, Namespace

print("jsonargparse", version("jsonargparse"))


class Plain:
    """Adds a method and no field, as a base that validates would."""


@dataclass(frozen=True)
class Empty:
    """The same, as a dataclass."""


@dataclass(frozen=True)
class RunOfEmpty(Empty):
    steps: int = 1


@dataclass(frozen=True)
class RunOfPlain(Plain):
    steps: int = 1


@dataclass(frozen=True)
class OptionsOfEmpty:
    run: RunOfEmpty = field(default_factory=RunOfEmpty)


@dataclass(frozen=True)
class OptionsOfPlain:
    run: RunOfPlain = field(default_factory=RunOfPlain)


print("expected: a base without fields changes nothing, and the section's defaults are steps=1 in both")
seen = {}
for options in (OptionsOfEmpty, OptionsOfPlain):
    parser = ArgumentParser(exit_on_error=False)
    parser.add_class_arguments(options)
    seen[options.__name__] = parser.get_defaults().run
    print(f"seen, {options.__name__}: {seen[options.__name__]!r}")
assert seen["OptionsOfEmpty"] == Namespace(steps=1)
assert seen["OptionsOfPlain"] != Namespace(steps=1)
EOF
