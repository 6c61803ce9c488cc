"""Chooses decoys: classes that an image does not have, and is asked for beside those that it has."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
from jaxtyping import Float

Beside = Callable[[tuple[int, ...], int], tuple[int, ...]]
"""Takes the classes of an image and its number in the set; returns decoys, fewer if there are not enough."""


def random_decoys(allowed: Sequence[int], count: int, seed: int) -> Beside:
    """Returns a chooser of decoys at random: the same for an image whatever the batches and the seed of the noise.

    Args:
      allowed: classes that prompts may name.
      count: number of decoys of each image.
    """

    def beside(present: tuple[int, ...], index: int) -> tuple[int, ...]:
        absent = [label for label in allowed if label not in present]
        drawn = np.random.default_rng([seed, index]).permutation(len(absent))[:count]
        return tuple(sorted(absent[place] for place in drawn.tolist()))

    return beside


def lookalikes(allowed: Sequence[int], count: int, likeness: Float[np.ndarray, "classes classes"]) -> Beside:
    """Returns a chooser of the decoys that are most like one of the image's classes; of equals the earlier.

    Args:
      allowed, count: as for `random_decoys`.
      likeness: how alike two classes are, such as `cosines`.
    """

    def beside(present: tuple[int, ...], index: int) -> tuple[int, ...]:
        if not present:
            return ()
        most_like = likeness[list(present)].max(axis=0)
        absent = [label for label in allowed if label not in present]
        return tuple(sorted(sorted(absent, key=lambda label: -most_like[label])[:count]))

    return beside


def cosines(embeddings: Float[np.ndarray, "classes width"]) -> Float[np.ndarray, "classes classes"]:
    """Returns the cosine of every two embeddings."""
    unit = embeddings / np.maximum(np.linalg.norm(embeddings, axis=1, keepdims=True), np.finfo(np.float32).tiny)
    return unit @ unit.T
