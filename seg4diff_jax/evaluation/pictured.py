"""Which images of a set people are shown."""

from __future__ import annotations

from typing import Literal

import numpy as np
from jaxtyping import Float, Int

Why = Literal["best", "random", "worst"]
SEED = 0


def pictured(
    accuracy: Float[np.ndarray, " images"], histograms: Int[np.ndarray, "images classes"], count: int
) -> list[tuple[int, Why]]:
    """A third of `count` images from the top, a third from the bottom, a third at random from those between.

    Best first; within each third from better to worse. The draw depends on the number of images alone. An image of one
    class is always right when just that is asked for, and shows nothing: it is among the best when others run out.

    Args:
      accuracy: percent of each image's pixels that are right; NaN: none counts, and the image is not shown.
      histograms: how many pixels each class has in each image.
      count: of fewer images all are taken.
    """
    count = min(count, int(np.isfinite(accuracy).sum()))
    present = (histograms > 0).sum(axis=1)
    order = np.lexsort((np.arange(len(accuracy)), -present, -accuracy, present < 2)).tolist()
    order = [image for image in order if np.isfinite(accuracy[image])]
    random = count // 3
    worst = (count - random) // 2
    best = count - random - worst
    at_bottom = sorted(order[best:], key=lambda image: accuracy[image])[:worst]
    between = [image for image in order[best:] if image not in set(at_bottom)]
    drawn = [between[place] for place in np.random.default_rng(SEED).permutation(len(between))[:random]]
    kinds: dict[Why, list[int]] = {"best": order[:best], "random": drawn, "worst": at_bottom}
    return [(image, why) for why, some in kinds.items() for image in sorted(some, key=lambda each: -accuracy[each])]
