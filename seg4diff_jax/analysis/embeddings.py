"""Embeds pictures and prompts in batches."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, UInt8

from seg4diff_jax.analysis.preprocessing import Preprocessing, prepared


def embed_in_batches(
    embed: Callable[[Array], Array],
    rows: Sequence[Any] | np.ndarray,
    batch: int,
    prepare: Callable[[Any], np.ndarray] = np.asarray,
) -> Float[Array, "rows features"]:
    """Embeds what `prepare` makes of each row, `batch` rows at a time."""
    parts = []
    for start in range(0, len(rows), batch):
        part = np.stack([prepare(row) for row in rows[start : start + batch]])
        # The batch is filled up with its first row, so that one compiled program serves every batch.
        filled = np.concatenate([part, np.repeat(part[:1], min(batch, len(rows)) - len(part), axis=0)])
        parts.append(embed(jnp.asarray(filled))[: len(part)])
    return jnp.concatenate(parts)


def embed_pictures(
    embed: Callable[[Array], Array],
    pictures: Sequence[UInt8[np.ndarray, "_ _ 3"]],
    preprocessing: Preprocessing,
    batch: int,
) -> Float[Array, "pictures features"]:
    """Prepares and embeds `batch` pictures at a time. Raises ValueError if there are none."""
    if not len(pictures):
        raise ValueError("expected at least one picture, found none")
    return embed_in_batches(embed, pictures, batch, lambda picture: prepared(picture, preprocessing))
