"""COCO's run lengths are the masks that COCO's own tools make of them, or refused."""

from __future__ import annotations

import numpy as np
import pytest
from pycocotools import mask as coco

from seg4diff_jax.data.errors import FolderError
from seg4diff_jax.data.run_lengths import decoded, lengths_of

SIZES = [(1, 1), (1, 40), (17, 23), (61, 50)]


def by_hand(mask: np.ndarray) -> list[int]:
    """Lengths down the columns, outside first."""
    pixels, lengths, current = mask.T.ravel().tolist(), [0], 0
    for pixel in pixels:
        if pixel != current:
            lengths.append(0)
            current = pixel
        lengths[-1] += 1
    return lengths


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("share", [0.0, 0.02, 0.5, 1.0])
def test_a_mask_comes_back_from_a_list_and_from_text(size, share):
    mask = (np.random.default_rng(0).random(size) < share).astype(np.uint8)
    encoded = coco.encode(np.asfortranarray(mask))
    lengths = by_hand(mask)
    assert lengths_of(encoded["counts"]).tolist() == lengths
    for counts in (lengths, encoded["counts"], encoded["counts"].decode()):
        read = decoded({"size": list(size), "counts": counts}, size, "a place")
        assert read.dtype == bool
        np.testing.assert_array_equal(read, mask)


def test_long_runs_are_read_as_cocos_tools_write_them():
    lengths = [3_000_000, 1, 900_000, 70, 5, 2_000_000]
    size = 1, sum(lengths)
    encoded = coco.frPyObjects({"size": list(size), "counts": lengths}, *size)
    assert lengths_of(encoded["counts"].decode()).tolist() == lengths


SIZE = (6, 5)
WHOLE = coco.encode(np.asfortranarray(np.arange(30).reshape(SIZE) % 7 < 3, np.uint8))["counts"].decode()


@pytest.mark.parametrize(
    ("mask", "problem"),
    [
        ({"size": SIZE, "counts": [10, 5]}, "counts make 15 pixels, and the image has 30"),
        ({"size": SIZE, "counts": [10, 25]}, "counts make 35 pixels, and the image has 30"),
        ({"size": SIZE, "counts": [40, -10]}, "counts make 30 pixels"),
        ({"size": SIZE, "counts": [10.0, 20]}, "its counts are not whole numbers"),
        ({"size": SIZE, "counts": [10, 10**30]}, "too large"),
        ({"size": SIZE, "counts": ""}, "counts make 0 pixels"),
        ({"size": SIZE, "counts": WHOLE[:-1]}, r"counts make \d+ pixels"),
        ({"size": SIZE, "counts": WHOLE + "1"}, r"counts make \d\d pixels"),
        ({"size": SIZE, "counts": "QQ"}, "its counts are cut off"),
        ({"size": SIZE, "counts": "oooooooooooo0"}, "its counts are more than an image has pixels"),
        ({"size": SIZE, "counts": "\x7f"}, "its counts are no text of run lengths"),
        ({"size": SIZE, "counts": "猫"}, "ascii"),
        ({"size": SIZE, "counts": None}, "damaged"),
        ({"size": SIZE}, "it has no 'counts'"),
        ({"size": [6.0, 5], "counts": [30]}, r"its size is \(6\.0, 5\)"),
        ({"size": [10**9, 10**9], "counts": [30]}, r"is of size .*expected the image's, \(6, 5\)"),
        ("text", "damaged"),
        ([[0, 0, 4, 0, 4, 4]], "is of polygons; expected run lengths"),
        ([], "is of polygons; expected run lengths"),
    ],
)
def test_what_is_no_mask_of_the_image_is_refused(mask, problem):
    with pytest.raises(FolderError, match=rf"^a place: a mask .*{problem}"):
        decoded(mask, SIZE, "a place")
