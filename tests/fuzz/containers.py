"""Damage to files that say what they hold: safetensors headers, the entries of a zip."""

from __future__ import annotations

import io
import json
import pickle
import zipfile
from collections.abc import Callable
from math import prod
from pathlib import Path
from typing import Any

import numpy as np

from tests.fuzz.files import rewrite
from tests.fuzz.payload import Pickled
from tests.fuzz.reader import Damage, Inapplicable
from tests.fuzz.trees import VALUES, damaged_tree

METADATA = "__metadata__"
LAYERS = 10**9
"""How many layers a name says that a model has."""

# ---- safetensors ----------------------------------------------------------------------------------------------------

Header = dict[str, Any]


def _parts(contents: bytes) -> tuple[Header, bytes]:
    length = int.from_bytes(contents[:8], "little")
    return json.loads(contents[8 : 8 + length]), contents[8 + length :]


def _whole(header: str, data: bytes) -> bytes:
    text = header.encode()
    return len(text).to_bytes(8, "little") + text + data


def entries(contents: bytes) -> range:
    """The bytes of a header that describe tensors: those of its metadata and of the numbers have no second witness."""
    length = int.from_bytes(contents[:8], "little")
    start = 8
    if METADATA in (header := _parts(contents)[0]):
        last = next(name for name in header if name != METADATA)
        start = contents.index(json.dumps(last).encode())
    return range(start, 8 + length)


def _edits(change: Callable[[np.random.Generator, Header, str], str]) -> Callable[[np.random.Generator, Path], str]:
    """Change the header's entry of one tensor; the numbers stay."""

    def edit(random: np.random.Generator, file: Path) -> str:
        header, data = _parts(file.read_bytes())
        names = [name for name in header if name != METADATA]
        name = names[random.integers(len(names))]
        said = change(random, header, name)
        rewrite(file, _whole(json.dumps(header), data))
        return f"{name}: {said}"

    return edit


def _overlap(random: np.random.Generator, header: Header, name: str) -> str:
    others = [other for other in header if other not in (name, METADATA)]
    if not others:
        raise Inapplicable
    other = others[random.integers(len(others))]
    header[name]["data_offsets"] = header[other]["data_offsets"]
    return f"lies where {other} does"


def _shift(_: np.random.Generator, header: Header, name: str) -> str:
    header[name]["data_offsets"] = [place + 4 for place in header[name]["data_offsets"]]
    return "4 bytes further"


def _retype(random: np.random.Generator, header: Header, name: str) -> str:
    """To a dtype of another size, or of the same and not of floating-point numbers."""
    former = header[name]["dtype"]
    same = {"F32": ["I32", "U32"], "F16": ["I16", "U16"], "BF16": ["I16", "U16"]}.get(former, [])
    kinds = [*same, "F64", "BOOL", "F4", "f32", "C64"]
    header[name]["dtype"] = kinds[random.integers(len(kinds))]
    return f"{former} is {header[name]['dtype']}"


def _reshape(random: np.random.Generator, header: Header, name: str) -> str:
    """To another shape of as many numbers."""
    shape = header[name]["shape"]
    others = [[*shape, 1], [1, *shape], [prod(shape)], shape[::-1], [prod(shape), 1]]
    others = [other for other in others if other != shape]
    header[name]["shape"] = others[random.integers(len(others))]
    return f"{shape} is {header[name]['shape']}"


def _rename(random: np.random.Generator, header: Header, name: str) -> str:
    new = [name + ".", name.replace(".", "..", 1), "", f"{name}.{name}", "../" + name][random.integers(5)]
    header[new] = header.pop(name)
    return f"is called {new!r}"


def _billion(_: np.random.Generator, header: Header, name: str) -> str:
    """Adds an empty tensor of a layer far beyond."""
    numbered = [part for part in name.split(".") if part.isdigit()]
    if not numbered:
        raise Inapplicable
    end = max(entry["data_offsets"][1] for key, entry in header.items() if key != METADATA)
    new = name.replace(f".{numbered[0]}.", f".{LAYERS}.", 1)
    header[new] = {"dtype": header[name]["dtype"], "shape": [0, *header[name]["shape"][1:]], "data_offsets": [end, end]}
    return f"and {new}"


def _lose(_: np.random.Generator, header: Header, name: str) -> str:
    del header[name]
    return "is not described"


def _length(random: np.random.Generator, file: Path) -> str:
    contents = bytearray(file.read_bytes())
    length = [0, 1, 2**31, 2**40, 2**63 - 1, 2**64 - 1, len(contents)][random.integers(7)]
    contents[:8] = length.to_bytes(8, "little")
    rewrite(file, bytes(contents))
    return f"a header of {length} bytes"


def _metadata(random: np.random.Generator, file: Path) -> str:
    header, data = _parts(file.read_bytes())
    former = header.pop(METADATA, {})
    others: list[Any] = [[], 7, "text", None, {"format": 7}, {"format": ["pt"]}, {**former, "more": {"a": 1}}]
    header = {METADATA: others[random.integers(len(others))], **header}
    rewrite(file, _whole(json.dumps(header), data))
    return f"its metadata is {json.dumps(header[METADATA])[:80]}"


def _field(random: np.random.Generator, file: Path) -> str:
    """A value of no writer's in a tensor's entry."""
    header, data = _parts(file.read_bytes())
    names = [name for name in header if name != METADATA]
    name, kinds = names[random.integers(len(names))], [*VALUES]
    kind = kinds[random.integers(len(kinds))]
    fits, write = VALUES[kind]
    text, said = damaged_tree(random, {name: header[name]}, "json", fits, write("json"))
    rest = json.dumps({key: entry for key, entry in header.items() if key != name})
    whole = text if not text.lstrip().startswith("{") else f"{rest.rstrip('}')}, {text.strip()[1:]}"
    rewrite(file, _whole(whole, data))
    return f"{kind}: {said}"


OF_HEADERS = tuple(
    Damage(name, apply)
    for name, apply in {
        "overlap": _edits(_overlap),
        "shift": _edits(_shift),
        "dtype": _edits(_retype),
        "shape": _edits(_reshape),
        "rename": _edits(_rename),
        "billion": _edits(_billion),
        "lose": _edits(_lose),
        "length": _length,
        "metadata": _metadata,
        "field": _field,
    }.items()
)


# ---- zip ------------------------------------------------------------------------------------------------------------


def _rewrites(
    change: Callable[[np.random.Generator, list[tuple[str, bytes]]], str], *, compression: int = zipfile.ZIP_STORED
) -> Callable[[np.random.Generator, Path], str]:
    """Change a zip's entries and write it anew, checksums and all."""

    def apply(random: np.random.Generator, file: Path) -> str:
        with zipfile.ZipFile(file) as opened:
            found = [(name, opened.read(name)) for name in opened.namelist()]
        said = change(random, found)
        written = io.BytesIO()
        with zipfile.ZipFile(written, "w", compression) as target:
            for name, contents in found:
                target.writestr(zipfile.ZipInfo(name), contents, compression)
        rewrite(file, written.getvalue())
        return said

    return apply


def _drop(random: np.random.Generator, found: list[tuple[str, bytes]]) -> str:
    name, _ = found.pop(random.integers(len(found)))
    return f"without {name}"


def _exchange(random: np.random.Generator, found: list[tuple[str, bytes]]) -> str:
    """Of two entries of unlike lengths each takes the other's place."""
    first = int(random.integers(len(found)))
    others = [place for place, (_, each) in enumerate(found) if len(each) != len(found[first][1])]
    if not others:
        raise Inapplicable
    second = others[random.integers(len(others))]
    (a, x), (b, y) = found[first], found[second]
    found[first], found[second] = (a, y), (b, x)
    return f"{a} and {b} exchanged"


def _shorten(random: np.random.Generator, found: list[tuple[str, bytes]]) -> str:
    place = int(random.integers(len(found)))
    name, contents = found[place]
    if len(contents) < 2:
        raise Inapplicable
    found[place] = name, contents[: len(contents) // 2]
    return f"{name} cut in half, with its checksum"


def _inject(_: np.random.Generator, found: list[tuple[str, bytes]]) -> str:
    place = next((place for place, (name, _) in enumerate(found) if name.endswith(".pkl")), 0)
    name = found[place][0]
    contents = pickle.dumps(Pickled(), protocol=2)
    if name.endswith(".npy"):
        head = io.BytesIO()
        np.lib.format.write_array(head, np.array([Pickled()], object), allow_pickle=True)
        contents = head.getvalue()
    found[place] = name, contents
    return f"{name} is a call"


def _rearrange(random: np.random.Generator, found: list[tuple[str, bytes]]) -> str:
    order = random.permutation(len(found))
    found[:] = [found[place] for place in order]
    return "entries in another order"


OF_ENTRIES = tuple(
    Damage(name, apply)
    for name, apply in {
        "drop": _rewrites(_drop),
        "exchange": _rewrites(_exchange),
        "shorten": _rewrites(_shorten),
        "inject": _rewrites(_inject),
        "rearrange": _rewrites(_rearrange),
        "compress": _rewrites(lambda random, found: "compressed", compression=zipfile.ZIP_DEFLATED),
    }.items()
)


def _bare(_: np.random.Generator, file: Path) -> str:
    rewrite(file, pickle.dumps(Pickled(), protocol=2))
    return "a pickle that is a call"


PICKLED = Damage("pickle", _bare)
