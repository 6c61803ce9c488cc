#!/usr/bin/env bash
# Pillow spreads the numbers of a grey PNG of 2 or 4 bits over 0..255, so class indices become others; with a palette it does not.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
"${PYTHON:-python3}" -m venv "$work/venv"
"$work/venv/bin/pip" install --quiet pillow==13.0.0 numpy==2.4.6
cd "$work"
"$work/venv/bin/python" - <<'EOF'
import io
import struct
import zlib

import numpy as np
import PIL
from PIL import Image

GRAY, PALETTE = 0, 3


def chunk(name: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))


def label_map(bits: int, color_type: int) -> bytes:
    """A PNG of one row with the labels 0, 1, 2, 3."""
    row = sum(label << bits * (3 - place) for place, label in enumerate(range(4)))
    palette = chunk(b"PLTE", bytes(range(12))) if color_type == PALETTE else b""
    head = chunk(b"IHDR", struct.pack(">IIBBBBB", 4, 1, bits, color_type, 0, 0, 0))
    rows = chunk(b"IDAT", zlib.compress(b"\0" + row.to_bytes(4 * bits // 8, "big")))
    return b"\x89PNG\r\n\x1a\n" + head + palette + rows + chunk(b"IEND", b"")


def labels(file: bytes) -> list[int]:
    return np.asarray(Image.open(io.BytesIO(file)))[0].tolist()


print("pillow", PIL.__version__)
print("expected: the labels 0, 1, 2, 3 of each file")
seen = {(bits, kind): labels(label_map(bits, kind)) for bits in (2, 4) for kind in (GRAY, PALETTE)}
for (bits, kind), found in seen.items():
    print(f"seen: {bits} bits, {'grey' if kind == GRAY else 'palette'}: {found}")
assert seen == {
    (2, GRAY): [0, 85, 170, 255],
    (2, PALETTE): [0, 1, 2, 3],
    (4, GRAY): [0, 17, 34, 51],
    (4, PALETTE): [0, 1, 2, 3],
}
EOF
