#!/usr/bin/env bash
# Pillow opens a PNG of 16 bits a channel in colour as 8 bits, and its mode does not tell; grey ones keep all 16.
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


def png(values, kind):
    """A valid PNG of one pixel of 16 bits a channel: kind 0 is grey, 2 is colour."""
    def chunk(name, data):
        return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))

    head = chunk(b"IHDR", struct.pack(">IIBBBBB", 1, 1, 16, kind, 0, 0, 0))
    data = zlib.compress(b"\0" + struct.pack(f">{len(values)}H", *values))
    return io.BytesIO(b"\x89PNG\r\n\x1a\n" + head + chunk(b"IDAT", data) + chunk(b"IEND", b""))


print("pillow", PIL.__version__)
grey = Image.open(png([300], 0))
colour = Image.open(png([300, 301, 65535], 2))
found = np.asarray(colour)[0, 0].tolist()
print("expected: 300 in grey, and 300, 301, 65535 in colour (or an error that says that 16 bits are not kept)")
print(f"seen: {int(np.asarray(grey)[0, 0])} in grey, mode {grey.mode}; {found} in colour, mode {colour.mode}")
assert int(np.asarray(grey)[0, 0]) == 300 and colour.mode == "RGB" and found == [1, 1, 255]
EOF
