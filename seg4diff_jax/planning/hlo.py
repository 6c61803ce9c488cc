"""Computes the bytes that a compiled program moves, from its text: over the interconnect, and to and from HBM.

The text is one chip's program. It contains the body of a loop once; here the body counts as often as the loop runs it.
The body of a loop of unknown length (the search in MAGNET's matching) counts once.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import NamedTuple

BITS = {"pred": 8, "bf16": 16, "c64": 64, "c128": 128}
BITS |= {f"{kind}{bits}": bits for kind in "suf" for bits in (4, 8, 16, 32, 64)}
COLLECTIVES = ("all-gather", "all-reduce", "reduce-scatter", "all-to-all", "collective-permute")
CONTROL = {"while": "body", "call": "to_apply", "async-start": "calls", "fusion": "calls"}
"""Operations that run another computation, and the attribute that names this computation."""
FREE = {"parameter", "constant", "tuple", "get-tuple-element", "bitcast", "iota", "after-all", "while", "call"}
FREE |= {"async-start", "partition-id"}
SLICES = ("dynamic-slice", "slice", "gather")
ARRAY = re.compile(r"\b([a-z]\w*)\[([\d,]*)\](\{[^{}]*\})?")


class Instruction(NamedTuple):
    """One line of a computation. `shape` is the shape of its result, `rest` the text after the operands."""

    name: str
    shape: str
    kind: str
    operands: tuple[str, ...]
    inside: str
    rest: str
    root: bool

    def attribute(self, name: str) -> str | None:
        found = re.search(rf"\b{name}=%?([\w.\-]+)", self.rest)
        return found[1] if found else None


class Collective(NamedTuple):
    """One kind of collective in a step: how often it runs, and the bytes that one chip receives by it."""

    kind: str
    times: int
    bytes: float


@dataclass(frozen=True)
class Program:
    """A compiled program: its computations by name, and the name of the one that runs first.

    Attributes:
      chips: number of chips that run the program.
    """

    computations: Mapping[str, Mapping[str, Instruction]]
    entry: str
    chips: int

    @classmethod
    def parse(cls, text: str) -> Program:
        """Parses the text of `compiled.as_text()`. Raises ValueError if there is no entry computation."""
        computations: dict[str, dict[str, Instruction]] = {}
        entry, current = None, None
        for line in text.splitlines():
            if not line.startswith((" ", "}", "HloModule")) and line.rstrip().endswith("{"):
                name = re.split(r"[ (]", line.removeprefix("ENTRY ").lstrip("%"), maxsplit=1)[0]
                entry = name if line.startswith("ENTRY ") else entry
                current = computations.setdefault(name, {})
            elif current is not None and (found := _instruction(line)):
                current[found.name] = found
        if entry is None:
            raise ValueError("the compiled program's text has no entry computation")
        chips = re.search(r"num_partitions=(\d+)", text.split("\n", 1)[0])
        return cls(computations, entry, int(chips[1]) if chips else 1)

    def collectives(self) -> list[Collective]:
        """Returns the kinds of collectives in use, the one with the most bytes first.

        Let n chips share arrays of S bytes together: each holds or gets S / n, or each has S to be summed. A chip then
        receives S (n - 1) / n in a gather, a scatter or an exchange, twice that in an all-reduce, and S in a permute.
        """
        times: dict[str, int] = {}
        received: dict[str, float] = {}
        for kind, line, size, count in self._collectives():
            times[kind] = times.get(kind, 0) + count
            received[kind] = received.get(kind, 0.0) + count * size * self._share(kind, line)
        return sorted((Collective(kind, times[kind], received[kind]) for kind in times), key=lambda each: -each.bytes)

    def _collectives(self) -> Iterator[tuple[str, Instruction, float, int]]:
        """Yields each collective's kind, its line, the bytes of its operands and how often it runs.

        A collective that overlaps with other work is listed in several fusions with one channel number; it counts once.
        """
        seen: set[str | None] = set()
        for line, where, count in self._run(fusions=True):
            kind, channel = _collective(line), line.attribute("channel_id")
            if kind is not None and channel not in seen:
                seen |= {channel} - {None}
                sizes = [_bytes(where[name].shape, everywhere=True) for name in line.operands if name in where]
                yield kind, line, sum(sizes, 0.0), count

    def _share(self, kind: str, line: Instruction) -> float:
        """Returns the bytes received for each byte of the operand."""
        n = self._group(line)
        shares = {"all-gather": n - 1.0, "all-reduce": 2 * (n - 1) / n, "collective-permute": 1.0}
        return shares.get(kind, (n - 1) / n)

    def _group(self, line: Instruction) -> int:
        """Returns how many chips take part in one instance of a collective."""
        if iota := re.search(r"replica_groups=\[\d+,(\d+)\]", line.rest):
            return int(iota[1])
        if named := re.search(r"replica_groups=mesh\[([^\]]*)\] ?\{([^}]*)\}", line.rest):
            sides = dict(re.findall(r"'(\w+)'=(\d+)", named[1]))
            return math.prod(int(sides[axis]) for axis in re.findall(r"'(\w+)'", named[2]))
        listed = re.search(r"replica_groups=\{\{([\d,]+)\}", line.rest)
        return listed[1].count(",") + 1 if listed else self.chips

    def traffic(self) -> float:
        """Returns the bytes to and from HBM, if every operation reads its operands once and writes its results once.

        Arrays that the compiler places in the chip's own memory, and kernels' repeated reads, are not counted.
        """
        shared = (count * size * (1 + self._gain(kind, line)) for kind, line, size, count in self._collectives())
        return sum(shared, 0.0) + sum(
            count * self._moved(line, where) for line, where, count in self._run(fusions=False)
        )

    def _gain(self, kind: str, line: Instruction) -> float:
        """Returns the size of a collective's result relative to its operand's."""
        n = self._group(line)
        return {"all-gather": float(n), "reduce-scatter": 1 / n}.get(kind, 1.0)

    def _run(
        self, *, fusions: bool, name: str | None = None, count: int = 1
    ) -> Iterator[tuple[Instruction, Mapping[str, Instruction], int]]:
        """Yields each instruction with its computation and how often it runs; `fusions`: those inside fusions too."""
        where = self.computations.get(self.entry if name is None else name, {})
        for line in where.values():
            yield line, where, count
            if line.kind in CONTROL and (fusions or line.kind != "fusion"):
                inner = line.attribute(CONTROL[line.kind]) or ""
                times = self._times(line) if line.kind == "while" else 1
                yield from self._run(fusions=fusions, name=inner, count=count * times)

    def _times(self, loop: Instruction) -> int:
        """Returns how often a loop runs its body.

        This is the trip count in the text, or else the bound that JAX's counter, which goes up from 0 by 1, is compared
        with.
        """
        if known := re.search(r'"known_trip_count":\{"n":"(\d+)"\}', loop.rest):
            return int(known[1])
        condition = self.computations.get(loop.attribute("condition") or "", {})
        roots = [line for line in condition.values() if line.root and line.kind == "compare"]
        ends = [condition[name] for root in roots for name in root.operands if name in condition]
        numbers = [int(end.inside) for end in ends if end.kind == "constant" and end.inside.isdigit()]
        return numbers[0] if len(numbers) == 1 else 1

    def _moved(self, line: Instruction, where: Mapping[str, Instruction]) -> float:
        if line.kind in FREE or line.kind.endswith("-done") or _collective(line):
            return 0.0
        if line.kind in SLICES:
            return _bytes(line.shape) + _bytes(line.shape, everywhere=True)
        if line.kind == "slice-start":  # its shape lists the operand, the result and a flag
            made = _arrays(line.shape)[1]
            return _bytes(made) + _bytes(made, everywhere=True)
        shapes = [where[name].shape for name in line.operands if name in where]
        if line.kind == "dynamic-update-slice":
            return 2 * _bytes(shapes[1])
        if line.kind != "fusion":
            # The shape of an operation that starts another one lists operands among the results.
            named = line.kind.endswith("-start") and line.shape.startswith("(")
            return _bytes(line.shape) + (0.0 if named else sum(map(_bytes, shapes)))
        inner = self.computations.get(line.attribute("calls") or "", {})
        return self._written(inner) + sum(self._read(inner, number, shape) for number, shape in enumerate(shapes))

    def _read(self, inner: Mapping[str, Instruction], number: int, shape: str) -> float:
        """Returns the bytes that a fusion reads of one operand: all of it, or only the slices that it takes."""
        whole = _bytes(shape)
        name = next(
            (each.name for each in inner.values() if each.kind == "parameter" and each.inside == str(number)), ""
        )
        used = (self._used(inner, user, name, whole) for user in _users(inner, name))
        return min(whole, sum(used, 0.0)) if whole else 0.0

    def _used(self, inner: Mapping[str, Instruction], user: Instruction, name: str, whole: float) -> float:
        """Returns the bytes that one instruction of a fusion reads of the value with this name."""
        if user.kind in SLICES:
            return _bytes(user.shape, everywhere=True)
        if user.kind == "fusion":
            nested = self.computations.get(user.attribute("calls") or "", {})
            shape = inner[name].shape
            places = (place for place, each in enumerate(user.operands) if each == name)
            return sum((self._read(nested, place, shape) for place in places), 0.0)
        handed_on = user.kind in ("tuple", "custom-call") or _collective(user)
        in_place = user.kind == "dynamic-update-slice" and user.operands[0] == name
        return 0.0 if handed_on or in_place else whole

    def _written(self, inner: Mapping[str, Instruction]) -> float:
        """Returns the bytes that a fusion writes: its results, or only the new part of results changed in place."""
        root = next(each for each in inner.values() if each.root)
        results = [inner[name] for name in root.operands] if root.kind == "tuple" else [root]
        total = 0.0
        for result in results:
            visible = _bytes(result.shape)
            while result.kind == "bitcast" and result.operands[0] in inner:
                result = inner[result.operands[0]]
            if result.kind == "dynamic-update-slice":
                visible = min(visible, _bytes(inner[result.operands[1]].shape, everywhere=True))
            # A custom call in a fusion starts or ends a collective, which is counted separately.
            if result.kind not in ("parameter", "custom-call") and not _collective(result):
                total += visible
        return total


def _collective(line: Instruction) -> str | None:
    return next((kind for kind in COLLECTIVES if line.kind in (kind, f"{kind}-start")), None)


def _users(inner: Mapping[str, Instruction], name: str) -> Iterator[Instruction]:
    """Yields the users of a value, and of the value in another shape (bitcast)."""
    for each in inner.values():
        if name in each.operands:
            if each.kind == "bitcast":
                for user in _users(inner, each.name):
                    yield user._replace(operands=tuple(name if old == each.name else old for old in user.operands))
            else:
                yield each


def _arrays(shape: str) -> list[str]:
    return [found[0] for found in ARRAY.finditer(shape)]


def _bytes(shape: str, *, everywhere: bool = False) -> float:
    """Returns the bytes of a shape's arrays; those in the chip's own memory, S(1) and up, only with `everywhere`."""
    total = 0.0
    for kind, sides, layout in ARRAY.findall(shape):
        if everywhere or not re.search(r"S\([1-9]", layout):
            bits = 8 if kind.startswith("f8") else BITS.get(kind, 0)
            total += bits / 8 * math.prod(int(side) for side in sides.split(",") if side)
    return total


def _instruction(line: str) -> Instruction | None:
    found = re.match(r"\s+(ROOT )?%?([\w.\-]+) = ", line)
    if not found:
        return None
    rest = line[found.end() :]
    end = _closing(rest, 0) + 1 if rest.startswith("(") else rest.index(" ")
    shape, rest = rest[:end], rest[end:].lstrip()
    kind, opening, _ = rest.partition("(")
    if not opening:
        return None
    end = _closing(rest, len(kind))
    inside = rest[len(kind) + 1 : end]
    return Instruction(
        found[2], shape, kind, tuple(re.findall(r"%([\w.\-]+)", inside)), inside, rest[end + 1 :], bool(found[1])
    )


def _closing(text: str, start: int) -> int:
    """Returns the position of the parenthesis that closes the one at `start`."""
    depth = 0
    for place in range(start, len(text)):
        depth += {"(": 1, ")": -1}.get(text[place], 0)
        if not depth:
            return place
    return len(text)
