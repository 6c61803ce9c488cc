"""Figures beside mIoU, written out with NumPy, SciPy and PyTorch: presence, bands along edges, highest points."""

from __future__ import annotations

import numpy as np
import torch
from scipy.ndimage import binary_erosion


def presence(scores: np.ndarray) -> np.ndarray:
    """Area, share and peak of classes that are all asked for: [3, classes] of [classes, tokens]."""
    area = [np.mean(scores.argmax(axis=0) == place) for place in range(len(scores))]
    parts = np.sort(scores / scores.sum(axis=0), axis=1)
    most = -(-scores.shape[1] // 32)
    return np.stack([area, parts[:, -most:].mean(axis=1), scores.max(axis=1)])


def band(mask: np.ndarray, width: int) -> np.ndarray:
    """As the authors' code: the mask without what is left of it in a frame of nothing, eroded `width` times."""
    framed = np.pad(mask, 1)
    return mask & ~binary_erosion(framed, np.ones((3, 3)), iterations=width)[1:-1, 1:-1]


def boundary(truth: np.ndarray, predicted: np.ndarray, width: int, classes: int) -> np.ndarray:
    """Pixels of each class in both bands, in the true and in the predicted one: [3, classes]."""
    rows = []
    for label in range(classes):
        true, own = (band(labels == label, width) & (truth != 255) for labels in (truth, predicted))
        rows.append(((true & own).sum(), true.sum(), own.sum()))
    return np.array(rows).T


def upsampled(scores: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    whole = torch.from_numpy(np.array(scores))[None]
    return torch.nn.functional.interpolate(whole, size, mode="bilinear")[0].numpy()


def pointing(scores: np.ndarray, truth: np.ndarray, class_of_row: np.ndarray, classes: int) -> np.ndarray:
    """Classes that are pointed at rightly, and that are tried: [2, classes], each 0 or 1."""
    found = np.zeros((2, classes), int)
    for grid, label in zip(upsampled(scores.astype(np.float64), truth.shape), class_of_row, strict=True):
        pixel = np.unravel_index((grid >= grid.max() - 2**-20 * abs(grid.max())).argmax(), truth.shape)
        if label != 255 and (truth == label).any() and truth[pixel] != 255:
            found[:, label] += truth[pixel] == label, 1
    return found
