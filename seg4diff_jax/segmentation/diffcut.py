"""DiffCut (Couairon and others, NeurIPS 2024, arXiv 2406.02842): cuts an image in two, and each part again.

    features -> affinity -> cut_tree -> parts_at -> similarities to each part's mean feature -> upsample, arg-max

Image tokens are the nodes of a graph, and edges weigh as much as two tokens' features are alike. A part is cut where
the normalized cut (Shi and Malik, 2000) is lowest, as long as that is below a threshold.

How often and where depends on the image, and each cut needs an eigenvector of another size. So this is done on the
host, by NumPy and SciPy: under jit every round would compute as many cuts, of full size, as there may ever be parts.
The cuts of one tree serve all thresholds. An affinity of tokens x tokens is held in 64 bits, of one image at a time.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import scipy.linalg
import scipy.sparse.linalg
from jaxtyping import Float, Int

POWER = 10
"""Of the affinity, as published: the larger, the less do tokens count that are alike by half."""
DENSE = 1024
"""Up to so many tokens all eigenvalues are computed; of more, the two largest by Lanczos's method."""
TINY = float(np.finfo(np.float64).tiny)


@dataclass(frozen=True)
class Part:
    """A part of an image, and where it would be cut.

    Attributes:
      tokens: the image tokens of the part, ascending.
      value: the normalized cut of the best cut, 0 to 2. Infinite for a single token.
      parts: the places in the tree of what it is cut into. Empty: it is not cut at any threshold.
    """

    tokens: Int[np.ndarray, " tokens"]
    value: float
    parts: tuple[int, ...] = ()


def normalised_features(features: Float[np.ndarray, "tokens channels"]) -> Float[np.ndarray, "tokens channels"]:
    """Returns features of length 1, in 64 bits. Zeros stay zeros."""
    features = features.astype(np.float64)
    return features / np.maximum(np.linalg.norm(features, axis=1, keepdims=True), TINY)


def affinity(features: Float[np.ndarray, "tokens channels"]) -> Float[np.ndarray, "tokens tokens"]:
    """Returns cosine similarities, brought to 0..1 over the image, to the power of POWER. Of equal features all are 1.

    Args:
      features: of length 1.
    """
    cosines = features @ features.T
    least, span = cosines.min(), np.ptp(cosines)
    if span < 1e-12:  # what is left is rounding
        return np.ones_like(cosines)
    return ((cosines - least) / span) ** POWER


def best_cut(
    weights: Float[np.ndarray, "tokens tokens"],
) -> tuple[Int[np.ndarray, " first"], Int[np.ndarray, " second"], float]:
    """Returns the two sides of the lowest normalized cut that splits the second eigenvector, and its value.

    The vector is that of the normalized Laplacian, over the root of the degrees. Of all its values each is tried as
    the border, where the release tries 100 that are evenly spaced.

    Args:
      weights: symmetric, of two tokens or more.
    """
    degrees = np.maximum(weights.sum(axis=1), TINY)
    root = 1 / np.sqrt(degrees)
    order = np.argsort(root * second_vector(root[:, None] * weights * root), kind="stable")
    within = np.cumsum(np.cumsum(weights[np.ix_(order, order)], axis=0), axis=1).diagonal()[:-1]
    before = np.cumsum(degrees[order])[:-1]
    crossing = np.maximum(before - within, 0)
    values = crossing / before + crossing / np.maximum(degrees.sum() - before, TINY)
    place = int(values.argmin())
    return np.sort(order[: place + 1]), np.sort(order[place + 1 :]), float(values[place])


def second_vector(matrix: Float[np.ndarray, "tokens tokens"]) -> Float[np.ndarray, " tokens"]:
    """Returns the eigenvector of the second largest eigenvalue of a symmetric matrix."""
    size = len(matrix)
    if size <= DENSE:
        return scipy.linalg.eigh(matrix, subset_by_index=[size - 2, size - 1])[1][:, 0]
    start = np.random.default_rng(0).standard_normal(size)  # SciPy's own start differs from call to call
    values, vectors = scipy.sparse.linalg.eigsh(matrix, k=2, which="LA", v0=start)
    return vectors[:, values.argmin()]


def cut_tree(weights: Float[np.ndarray, "tokens tokens"], threshold: float) -> list[Part]:
    """Cuts the image, and every part again, as long as the normalized cut is below a threshold.

    Returns all parts: first the whole image; those that a part is cut into come after it.

    Args:
      weights: the affinity of image tokens.
      threshold: 0 to 1. At 1 an image without any structure would be cut to single tokens.
    """
    tree: list[Part] = []
    waiting: list[Int[np.ndarray, " tokens"]] = [np.arange(len(weights))]
    while len(tree) < len(waiting):
        tokens = waiting[len(tree)]
        if len(tokens) < 2:
            tree.append(Part(tokens, np.inf))
            continue
        first, second, value = best_cut(weights[np.ix_(tokens, tokens)])
        cut = value < threshold
        tree.append(Part(tokens, value, (len(waiting), len(waiting) + 1) if cut else ()))
        waiting += [tokens[first], tokens[second]] if cut else []
    return tree


def parts_at(tree: list[Part], threshold: float) -> list[Int[np.ndarray, " tokens"]]:
    """Returns the parts that a threshold leaves, in the order of their first tokens.

    Args:
      threshold: not above the one that the tree was cut at.
    """
    found, waiting = [], [0]
    while waiting:
        part = tree[waiting.pop()]
        if part.parts and part.value < threshold:
            waiting += part.parts
        else:
            found.append(part.tokens)
    return sorted(found, key=lambda tokens: tokens[0])


def diffcut(
    features: Float[np.ndarray, "tokens channels"], thresholds: Float[np.ndarray, " thresholds"]
) -> list[Float[np.ndarray, "_ tokens"]]:
    """Returns the maps of one image's segments at each threshold, float32.

    A map holds how much each token's feature, of length 1, is like the mean of the segment's: their product. Upsampled
    maps are those of upsampled features, so that a pixel goes to the segment that its feature is most like.

    Args:
      features: of each image token, finite.
      thresholds: of the normalized cut, above 0 and below 1. The larger, the more segments.
    """
    features = normalised_features(features)
    tree = cut_tree(affinity(features), float(np.max(thresholds)))
    each = [parts_at(tree, float(threshold)) for threshold in thresholds]
    means = [np.stack([features[tokens].mean(axis=0) for tokens in parts]) for parts in each]
    return [(one @ features.T).astype(np.float32) for one in means]
