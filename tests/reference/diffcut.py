"""Recursive normalized cuts in plain loops: every border in the eigenvector of the generalised problem is tried."""

from __future__ import annotations

import numpy as np
import scipy.linalg


def affinity(features: np.ndarray, power: int) -> np.ndarray:
    cosine = lambda x, y: float(x @ y / (np.linalg.norm(x) * np.linalg.norm(y)))
    found = np.array([[cosine(x, y) for y in features] for x in features])
    return ((found - found.min()) / (found.max() - found.min())) ** power


def normalized_cut(weights: np.ndarray, side: np.ndarray) -> float:
    """Of the graph into the nodes where `side` is true, and all others."""
    crossing = weights[side][:, ~side].sum()
    return crossing / weights[side].sum() + crossing / weights[~side].sum()


def best_cut(weights: np.ndarray) -> tuple[np.ndarray, float]:
    """(D - W) y = lambda D y, as Shi and Malik have it: the second smallest."""
    degrees = np.diag(weights.sum(axis=1))
    vector = scipy.linalg.eig(degrees - weights, degrees)
    second = vector[1][:, np.argsort(vector[0].real)[1]].real
    sides = [second > border for border in np.sort(second)[:-1]]
    values = [normalized_cut(weights, side) for side in sides]
    return sides[int(np.argmin(values))], min(values)


def parts(weights: np.ndarray, tokens: np.ndarray, threshold: float) -> list[list[int]]:
    if len(tokens) > 1:
        side, value = best_cut(weights[np.ix_(tokens, tokens)])
        if value < threshold:
            return parts(weights, tokens[side], threshold) + parts(weights, tokens[~side], threshold)
    return [tokens.tolist()]
