"""What files hold, what befalls each kind, and whether the file shows it.

A flipped bit in a weight of a safetensors file, in a letter of a caption or in a JPEG's pixels makes another sound
file: nothing in these formats could tell. There only what the format does say is damaged, or a reading that differs is
none of the reader's faults. Where there are checksums (our manifests, PNG, zip, records) every bit counts.
"""

from __future__ import annotations

from tests.fuzz import files
from tests.fuzz.containers import OF_ENTRIES, OF_HEADERS, PICKLED, entries
from tests.fuzz.reader import Damage
from tests.fuzz.trees import RESPACED, of_tree

LENGTHS, VALUES = files.of_length(noticed=False), files.of_values(noticed=False)
CUT = files.of_length(noticed=True)

CONTENTS: dict[str, tuple[Damage, ...]] = {
    # Some checksum covers every byte.
    "summed": (*CUT, *files.of_values(noticed=True), *files.of_places()),
    "png": (*CUT, *files.of_values(noticed=True), *files.of_places(swapped=False)),
    "zip": (*CUT, *files.of_values(noticed=True), *files.of_places(), *OF_ENTRIES, PICKLED),
    # The header is checked against the model and the file's length; numbers and metadata are what they are.
    "safetensors": (*CUT, *files.of_values(entries, noticed=True), *files.of_places(), *OF_HEADERS, PICKLED),
    # A text without an end is no JSON; another letter may be. Of values only those that mean nothing are written.
    "json": (CUT[0], *LENGTHS[1:], *VALUES, *files.of_places(), *of_tree("json"), *of_tree("json"), RESPACED),
    "yaml": (*LENGTHS, *VALUES, *files.of_places(), *of_tree("yaml"), *of_tree("yaml")),
    # Nothing tells.
    "jpeg": (*LENGTHS, *VALUES, *files.of_places(swapped=False)),
    "hdf5": (*LENGTHS, *VALUES, *files.of_places(swapped=False)),
    "text": (*LENGTHS, *VALUES, *files.of_places(swapped=False)),
    "gguf": (*CUT, *VALUES, *files.of_places(), PICKLED),
    "pickle": (*LENGTHS, *VALUES, *files.of_places(), PICKLED),
}
