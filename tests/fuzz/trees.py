"""Damage to JSON and YAML: values that no writer has written, put in the place of one that is there.

The tree is parsed, the value replaced by a mark, and the mark in the text by what is to be read: so texts come about
that no writer makes, such as keys that occur twice or lists a hundred thousand deep.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import yaml

from tests.fuzz.files import rewrite
from tests.fuzz.reader import Damage, Inapplicable

MARK = "damaged-value"
DEPTH, DIGITS, LONG, MANY, HUGE = 100_000, 5000, 1 << 20, 3000, 10**18
Place = tuple[Any, ...]
"""Keys and places from the root of a tree."""


def nodes(tree: Any, at: Place = ()) -> Iterator[tuple[Place, Any]]:
    """Every value of a tree with its place, the root first."""
    yield at, tree
    children = tree.items() if isinstance(tree, dict) else enumerate(tree) if isinstance(tree, list) else ()
    for key, child in children:
        yield from nodes(child, (*at, key))


def _put(tree: Any, at: Place, value: Any) -> Any:
    if not at:
        return value
    owner = tree
    for key in at[:-1]:
        owner = owner[key]
    owner[at[-1]] = value
    return tree


def _number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _scalar(value: Any) -> bool:
    return not isinstance(value, dict | list)


def _other_types(value: Any) -> list[str]:
    """Texts of values of other types: `1` is one of 1.5 and not the other way, as many write 1 for 1.0."""
    kinds: dict[str, Callable[[Any], bool]] = {
        '"text"': lambda v: not isinstance(v, str),
        "7": lambda v: not _number(v),
        "1.5": lambda v: not isinstance(v, float),
        "true": lambda v: not isinstance(v, bool),
        "[]": lambda v: not isinstance(v, list),
        "[[1, 2], {}]": lambda v: True,
        "{}": lambda v: not isinstance(v, dict),
        '{"text": 7}': lambda v: not isinstance(v, dict),
    }
    return [text for text, other in kinds.items() if other(value)]


Written = Callable[[np.random.Generator, Any], str]
"""The text in a value's place, for the value."""


def _twice(random: np.random.Generator, value: Any) -> str:
    """Of an object, which has one key twice then."""
    key = list(value)[random.integers(len(value))]
    rest = ", ".join(f"{json.dumps(name)}: {json.dumps(each)}" for name, each in value.items())
    return f"{{{rest}, {json.dumps(key)}: {json.dumps([value[key]])}}}"


def _repeated(random: np.random.Generator, value: Any) -> str:
    """Of a list of objects, one of which occurs twice then, with another value somewhere in it."""
    again = json.loads(json.dumps(value[random.integers(len(value))]))
    leaves = [at for at, leaf in nodes(again) if _number(leaf) and at and not str(at[-1]).endswith("id")]
    if leaves:
        _put(again, leaves[random.integers(len(leaves))], 3)
    return json.dumps([*value, again])


NAN, INFINITY = {"json": "NaN", "yaml": ".nan"}, {"json": "Infinity", "yaml": ".inf"}
VALUES: dict[str, tuple[Callable[[Any], bool], Callable[[str], Written]]] = {
    "type": (lambda v: True, lambda _: lambda r, v: (texts := _other_types(v))[r.integers(len(texts))]),
    "null": (lambda v: v is not None, lambda _: lambda r, v: "null"),
    "negative": (_number, lambda _: lambda r, v: str(-abs(v) - 1)),
    "zero": (_number, lambda _: lambda r, v: "0"),
    "fraction": (lambda v: type(v) is int, lambda _: lambda r, v: f"{v + 0.5}"),
    "huge": (_number, lambda _: lambda r, v: str(HUGE)),
    "nan": (_number, lambda form: lambda r, v: NAN[form]),
    "infinity": (_number, lambda form: lambda r, v: INFINITY[form]),
    "digits": (_number, lambda _: lambda r, v: "1" * DIGITS),
    "exponent": (_number, lambda _: lambda r, v: "1.0e+999"),
    "deep": (lambda v: True, lambda _: lambda r, v: "[" * DEPTH + "]" * DEPTH),
    "long": (_scalar, lambda _: lambda r, v: json.dumps("x" * LONG)),
    "many": (lambda v: True, lambda _: lambda r, v: json.dumps([[]] * MANY)),
    "listed": (_scalar, lambda _: lambda r, v: json.dumps([v])),
    "twice": (lambda v: isinstance(v, dict) and bool(v), lambda _: _twice),
    "repeated": (lambda v: isinstance(v, list) and bool(v) and isinstance(v[0], dict), lambda _: _repeated),
}
"""Kind of damage: which values it befalls, and what is written in their place, in JSON or YAML."""
EXPANDING = "&a [x, x, x, x, x, x, x, x, x]"


def _bomb(_: np.random.Generator, __: Any) -> str:
    """A list of nine times nine times ... a list, by reference."""
    levels = [EXPANDING, *(f"&{b} [{', '.join([f'*{a}'] * 9)}]" for a, b in zip("abcdefgh", "bcdefghi", strict=True))]
    return f"[{', '.join(levels)}]"


OF_YAML: dict[str, Written] = {
    "bomb": _bomb,
    "tag": lambda r, v: "!!python/object/apply:tests.fuzz.payload.leave_trace []",
    "class": lambda r, v: "{class_path: tests.fuzz.payload.Trace, init_args: {}}",
    "import": lambda r, v: "tests.fuzz.payload.Trace",
}
"""What only YAML has, or only what reads YAML."""

FORMS: dict[str, tuple[Callable[[str], Any], Callable[[Any], str]]] = {
    "json": (json.loads, lambda tree: json.dumps(tree, indent=1)),
    "yaml": (yaml.safe_load, lambda tree: yaml.safe_dump(tree, sort_keys=False)),
}


def damaged_tree(
    random: np.random.Generator, tree: Any, form: str, fits: Callable[[Any], bool], write: Written
) -> tuple[str, str]:
    """The text of a tree with one value replaced, and a description of that."""
    found = [(at, value) for at, value in nodes(tree) if fits(value)]
    if not found:
        raise Inapplicable
    at, value = found[random.integers(len(found))]
    text = write(random, value)
    marked = FORMS[form][1](_put(tree, at, MARK))
    quoted = json.dumps(MARK) if form == "json" else MARK
    assert marked.count(quoted) == 1
    said = text if len(text) < 80 else f"{text[:20]}... ({len(text)} characters)"
    return marked.replace(quoted, text), f"{'.'.join(map(str, at)) or 'all of it'} = {said}"


def _replaces(form: str, fits: Callable[[Any], bool], write: Written) -> Callable[[np.random.Generator, Path], str]:
    def replace(random: np.random.Generator, file: Path) -> str:
        text, said = damaged_tree(random, FORMS[form][0](file.read_text("utf-8")), form, fits, write)
        rewrite(file, text.encode())
        return said

    return replace


def _deletes(form: str) -> Callable[[np.random.Generator, Path], str]:
    def delete(random: np.random.Generator, file: Path) -> str:
        tree = FORMS[form][0](file.read_text("utf-8"))
        found = [at for at, _ in nodes(tree) if at and isinstance(at[-1], str)]
        if not found:
            raise Inapplicable
        at = found[random.integers(len(found))]
        owner = tree
        for key in at[:-1]:
            owner = owner[key]
        del owner[at[-1]]
        rewrite(file, FORMS[form][1](tree).encode())
        return f"{'.'.join(map(str, at))} is absent"

    return delete


def of_tree(form: str) -> tuple[Damage, ...]:
    """What befalls one value of a JSON or YAML file."""
    values = {name: (fits, write(form)) for name, (fits, write) in VALUES.items()}
    if form == "yaml":
        values |= {name: (lambda v: True, write) for name, write in OF_YAML.items()}
    damages = [Damage(name, _replaces(form, fits, write)) for name, (fits, write) in values.items()]
    return (*damages, Damage("deleted", _deletes(form)))


def _respaces(random: np.random.Generator, file: Path) -> str:
    """JSON says the same with other white space."""
    tree = json.loads(file.read_text("utf-8"))
    indent = int(random.integers(0, 5))
    rewrite(file, ("\n\t " + json.dumps(tree, indent=indent, separators=(" , ", " :  ")) + " \n\n").encode())
    return f"other white space, indented by {indent}"


RESPACED = Damage("respaced", _respaces)
