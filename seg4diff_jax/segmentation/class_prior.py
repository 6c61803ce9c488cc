"""How much attention the words of each class draw in any picture, so that this can be told from what one picture shows.

Some words draw attention wherever they are asked for: such a class takes pixels from others in a long vocabulary. Their
mean over pictures that nobody labelled says how much; logit adjustment (Menon et al., ICLR 2021) divides a classifier's
scores by a power of its prior in the same way.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from jaxtyping import Float

from seg4diff_jax.checked import Checked
from seg4diff_jax.quoting import quoted


@dataclass(frozen=True)
class ClassPrior(Checked):
    """The mean attention of image tokens to each class's words, over pictures that nobody labelled.

    Attributes:
      means: by class name, above 0 and at most 1.
      block: the block whose attention it is, the mean of its heads.
      step: the noise level, counted from the clean end of 28.
      pictures: how many it was measured on.
    """

    means: Mapping[str, float]
    block: int
    step: int
    pictures: int

    def problems(self) -> list[str]:
        """Returns what is wrong, one sentence for each problem."""
        found = [] if self.means else ["means is empty; expected the mean attention to at least one class"]
        found += [
            f"means has {mean!r} for {quoted(name)}; expected a number above 0 and at most 1"
            for name, mean in self.means.items()
            if not 0 < mean <= 1
        ][:1]
        for name, least in (("block", 0), ("step", 1), ("pictures", 1)):
            if getattr(self, name) < least:
                found.append(f"{name} is {getattr(self, name)}; expected at least {least}")
        return found

    def of(self, classes: Sequence[str]) -> Float[np.ndarray, " classes"]:
        """Returns the means of some classes, in order. Raises ValueError for a class that was not measured."""
        if unknown := [name for name in classes if name not in self.means]:
            known = ", ".join(map(quoted, list(self.means)[:3]))
            raise ValueError(
                f"the class prior has no mean of {', '.join(map(quoted, unknown[:3]))}; it was measured for "
                f"{len(self.means)} classes, such as {known}: measure it for all that are asked for"
            )
        return np.array([self.means[name] for name in classes], np.float32)


def divided_by_prior(
    averaging: Float[np.ndarray, "prompts classes tokens"], prior: Float[np.ndarray, "prompts classes"], power: float
) -> Float[np.ndarray, "prompts classes tokens"]:
    """Returns the weights of maps that are divided by a power of their class's prior. Power 0 changes nothing.

    Args:
      averaging: weights of each class's tokens in each prompt (`ClassPrompts.averaging`).
      prior: of each class, above 0.
    """
    if not power:
        return averaging
    return (averaging / prior[..., None] ** np.float32(power)).astype(np.float32)
