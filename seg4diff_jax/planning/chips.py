"""TPU chips and slices: the figures of one chip, and the devices of a slice, from the slice's name."""

from __future__ import annotations

import importlib.util
import math
import re
from dataclasses import dataclass
from typing import Any

from jax.errors import JaxRuntimeError


@dataclass(frozen=True)
class Chip:
    """Figures of one chip, as Google's documentation states them.

    Attributes:
      name: name of the chip in topologies.
      flops: peak bf16 operations per second.
      memory: bytes of HBM. The compiler reserves some of them.
      memory_rate: bytes per second to and from HBM.
      link_rate: bytes per second that one chip receives over its interconnect when all links are busy. This is half of
        the documented rate, which is for both directions together.
      axes: number of axes of a slice's torus.
      most: largest number of chips in one slice.
      source: where these figures are documented.
    """

    name: str
    flops: float
    memory: float
    memory_rate: float
    link_rate: float
    axes: int
    most: int
    source: str


DOCUMENTATION = "https://docs.cloud.google.com/tpu/docs/"
CHIPS = {
    chip.name: chip
    for chip in (
        Chip("v5e", 197e12, 16.0 * 2**30, 819e9, 200e9, 2, 256, f"{DOCUMENTATION}v5e"),
        Chip("v5p", 459e12, 95.0 * 2**30, 2765e9, 600e9, 3, 6144, f"{DOCUMENTATION}v5p"),
        Chip("v6e", 918e12, 32.0 * 2**30, 1600e9, 400e9, 2, 256, f"{DOCUMENTATION}v6e"),
    )
}


@dataclass(frozen=True)
class Slice:
    """A slice: chips of one kind, with `sides` chips along each axis."""

    chip: Chip
    sides: tuple[int, ...]

    @classmethod
    def parse(cls, name: str) -> Slice:
        """Makes a slice from a name such as `v5e:4x4` or `v5p:2x2x1`. Raises ValueError for other names."""
        found = re.fullmatch(r"(\w+):(\d+(?:x\d+)*)", name)
        chip = CHIPS.get(found[1]) if found else None
        if found is None or chip is None:
            raise ValueError(
                f"topology is {name!r}; expected a chip and its slice's sides, as in v5e:4x4 or v5p:2x2x1, the chip "
                f"one of {', '.join(CHIPS)}"
            )
        sides = tuple(map(int, found[2].split("x")))
        if len(sides) != chip.axes or 0 in sides:
            example = "x".join(["2"] * chip.axes)
            raise ValueError(
                f"topology is {name!r}; slices of {chip.name} have {chip.axes} sides, as in {chip.name}:{example}"
            )
        if math.prod(sides) > chip.most:
            raise ValueError(
                f"topology is {name!r}, {math.prod(sides)} chips; slices of {chip.name} have at most {chip.most}"
            )
        return cls(chip, sides)

    @property
    def name(self) -> str:
        return f"{self.chip.name}:{'x'.join(map(str, self.sides))}"

    @property
    def chips(self) -> int:
        return math.prod(self.sides)

    @property
    def host(self) -> Slice:
        """The chips of one host, which are 2 x 2, or fewer in a smaller slice."""
        sides = tuple(min(2, side) for side in self.sides[:2])
        return Slice(self.chip, sides + (1,) * (len(self.sides) - 2))

    def devices(self) -> list[Any]:
        """Returns devices to compile for, which need not exist.

        Raises:
          ModuleNotFoundError: libtpu, which holds the compiler, is not installed.
          ValueError: libtpu does not know such a slice.
        """
        if importlib.util.find_spec("libtpu") is None:
            raise ModuleNotFoundError(
                "libtpu, which holds the compiler for TPUs, is not installed: pip install libtpu, or in the "
                "clone pip install -e '.[plan]'; no TPU is needed"
            )
        from jax.experimental import topologies

        try:
            described: Any = topologies.get_topology_desc(
                self.name, platform="tpu", chips_per_host_bounds=(*self.host.sides[:2], 1)
            )
        except JaxRuntimeError as error:
            raise ValueError(f"topology is {self.name!r}, which libtpu refuses: {error}") from None
        if len(described.devices) != self.chips:
            raise ValueError(f"{self.name}: libtpu describes {len(described.devices)} devices for {self.chips} chips")
        return described.devices
