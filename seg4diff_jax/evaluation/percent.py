"""Shares as they are reported: in percent, or as nothing where there was nothing to score."""

from __future__ import annotations

import numpy as np
from jaxtyping import Float

Percent = float | None
"""None where nothing was there to be scored."""


def percent(share: float) -> Percent:
    """Returns a share in percent, to four places; None for NaN."""
    return None if np.isnan(share) else round(100 * float(share), 4)


def mean_percent(shares: Float[np.ndarray, " shares"]) -> Percent:
    """Returns the mean of the shares that are not NaN, in percent."""
    known = shares[~np.isnan(shares)]
    return percent(known.mean()) if len(known) else None
