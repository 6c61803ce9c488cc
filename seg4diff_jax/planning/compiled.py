"""Compiles a traced program ahead of time for TPUs, to tell the bytes that it holds and moves on one chip."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Any, NamedTuple

from jax.errors import JaxRuntimeError

from seg4diff_jax.planning.hlo import Collective, Program

UNITS = {"": 1, "K": 2**10, "M": 2**20, "G": 2**30, "T": 2**40}


@dataclass(frozen=True)
class Memory:
    """The bytes of one chip's HBM that a program uses.

    Attributes:
      parts: bytes by use. Arguments by kind (base, encoders, adapters, optimizer, batch), what their layout in memory
        adds (padding), temporaries, output that is not in donated arguments' memory, and code. If the compiler gave
        up: the sizes in its message.
      total: sum of the parts.
      limit: bytes of HBM of the chip; if the compiler gave up, the bytes that it had available.
      gave_up: whether the compiler found no program that fits.
    """

    parts: dict[str, float]
    total: float
    limit: float
    gave_up: bool = False

    @property
    def fits(self) -> bool:
        return not self.gave_up and self.total <= self.limit


@dataclass(frozen=True)
class Moved:
    """Bytes that a compiled program moves: to and from one chip's HBM, and to this chip over the interconnect."""

    hbm: float
    collectives: tuple[Collective, ...]

    @property
    def received(self) -> float:
        return sum((each.bytes for each in self.collectives), 0.0)


class Compiled(NamedTuple):
    """What a compiled program needs. `moved` and `places`, its results' shardings, are None if the compiler gave up."""

    memory: Memory
    moved: Moved | None
    places: Any = None


def compiled(traced: Any, arguments: dict[str, float], limit: float) -> Compiled:
    """Compiles a traced program.

    Args:
      arguments: bytes of the program's arguments, by kind.
      limit: bytes of HBM of the chip.
    """
    try:
        program = traced.lower().compile()
    except JaxRuntimeError as error:
        return Compiled(refused(str(error), arguments, limit), None)
    text = Program.parse(program.as_text())
    moved = Moved(text.traffic(), tuple(text.collectives()))
    return Compiled(measured(program.memory_analysis(), arguments, limit), moved, program.output_shardings)


def measured(analysis: Any, arguments: dict[str, float], limit: float) -> Memory:
    """Makes a `Memory` from the compiler's memory analysis."""
    parts = {
        **arguments,
        "padding": float(analysis.argument_size_in_bytes) - sum(arguments.values()),
        "temporaries": float(analysis.temp_size_in_bytes),
        "output": float(analysis.output_size_in_bytes - analysis.alias_size_in_bytes),
        "code": float(analysis.generated_code_size_in_bytes),
    }
    return Memory(parts, sum(parts.values()), limit)


def refused(message: str, arguments: dict[str, float], limit: float) -> Memory:
    """Makes a `Memory` from one of the compiler's messages that no program fits.

    Raises:
      JaxRuntimeError: the message is about anything else.
    """
    size = r"\(?([\d.]+)([KMGT]?)\w*\)?"
    beside = re.search(rf"required for HLO temporaries {size} exceeds available HBM {size}", message)
    whole = re.search(rf"Used {size} of {size} hbm", message)
    found = beside or whole
    if found is None:
        raise JaxRuntimeError(message)
    needed, allowed = float(found[1]) * UNITS[found[2]], float(found[3]) * UNITS[found[4]]
    taken = sum(arguments.values(), 0.0)
    rest = {"temporaries": needed} if beside else {"everything else": needed - taken}
    return Memory(arguments | rest, taken + sum(rest.values()), min(allowed, limit), gave_up=True)
