"""MAGNET's objective: the flow-matching loss, and mask losses of the expert block's attention.

loss = velocity_weight |v - (eps - z)|^2 + focal_weight focal + dice_weight dice
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Any, Literal, NamedTuple

from jaxtyping import Array, Bool, Float

from seg4diff_jax.checked import Checked
from seg4diff_jax.flow import velocity_loss, velocity_target
from seg4diff_jax.magnet.losses import ALPHA, GAMMA, FocalWeight, MaskLosses, class_losses, mask_losses
from seg4diff_jax.magnet.matching import DICE_COST, FOCAL_COST
from seg4diff_jax.magnet.targets import class_maps, matched_maps
from seg4diff_jax.models.attention import DEFAULT_OPTIONS, AttentionRequest, ForwardOptions, JointAttention
from seg4diff_jax.models.conditioning import TextConditioning
from seg4diff_jax.models.mask_head import MaskHead
from seg4diff_jax.models.sd3.model import MMDiT
from seg4diff_jax.passes import NoisedImages, velocity


@dataclass(frozen=True)
class MagnetObjective(Checked):
    """Which losses train the expert block's attention. Static under jit. The defaults are the paper's, for COCO.

    Attributes:
      targets: `classes`: masks belong to classes, and the prompt is the names of the classes (COCO). `matching`: masks
        have no names, and each is matched with the map most like it, among all heads and tokens (SA-1B).
      masks_from: what predicts the masks. `scores`: the sigmoid of q.k / sqrt(head_dim), for each class by itself.
        `log_probs`: the log of the head-mean probability, log-softmax over the prompt's classes, by which evaluation
        chooses labels; see `losses.class_losses`. `log_probs` needs `classes`.
      focal: `sigmoid`, or `release`: the weights in the focal loss and in the matching's focal cost use the raw score
        instead of its sigmoid. For `scores` only.
      mask_head: `conv`: the release's head (`models.mask_head`) refines each token's map in training; None: no head.
        For `scores` only.
      alpha: weight of a mask's own pixels in the focal loss, 0 to 1. For `scores` only.
      gamma: exponent of the focal loss, at least 0; for `log_probs` 0 or at least 1.
      velocity_weight: weight of the flow-matching loss in the sum.
      focal_weight: weight of the focal loss in the sum.
      dice_weight: weight of the dice loss in the sum.
      focal_cost: weight of the focal loss in the matching's cost. For `matching` only.
      dice_cost: weight of the dice loss in the matching's cost. For `matching` only.
    """

    targets: Literal["classes", "matching"] = "classes"
    masks_from: Literal["scores", "log_probs"] = "scores"
    focal: FocalWeight = "sigmoid"
    mask_head: Literal["conv"] | None = None
    alpha: float = ALPHA
    gamma: float = GAMMA
    velocity_weight: float = 1.0
    focal_weight: float = 0.1
    dice_weight: float = 0.2
    focal_cost: float = FOCAL_COST
    dice_cost: float = DICE_COST

    def problems(self) -> list[str]:
        """Returns a sentence for each option that does not fit."""
        found = self._problems_of_log_probs() if self.masks_from == "log_probs" else []
        for option in ("focal_cost", "dice_cost"):
            if self.targets == "classes" and getattr(self, option) != getattr(type(self), option):
                found.append(
                    f"{option} is {getattr(self, option)} and targets 'classes', which match nothing: leave {option} "
                    "out, or take targets 'matching'"
                )
        for option in ("velocity_weight", "focal_weight", "dice_weight", "focal_cost", "dice_cost"):
            if not 0 <= getattr(self, option) < math.inf:
                found.append(f"{option} is {getattr(self, option)}; expected a finite number, at least 0")
        if not 0 <= self.alpha <= 1:
            found.append(f"alpha is {self.alpha}; expected 0 to 1")
        if not 0 <= self.gamma < math.inf:
            found.append(f"gamma is {self.gamma}; expected at least 0: 2 is usual, 0 is cross-entropy")
        if self.focal == "release" and self.gamma != 2:
            found.append(f"focal is 'release' and gamma {self.gamma}; the release's is 2: leave one of them out")
        return found

    def _problems_of_log_probs(self) -> list[str]:
        found = []
        if self.targets == "matching":
            found.append(
                "masks_from is 'log_probs', a distribution over a prompt's classes, and targets is 'matching', where "
                "masks have no classes: take masks_from 'scores', or targets 'classes'"
            )
        for option in ("focal", "mask_head", "alpha"):
            if getattr(self, option) != getattr(type(self), option):
                found.append(
                    f"{option} is {getattr(self, option)!r} and masks_from 'log_probs'; it refines and weighs scores: "
                    f"leave {option} out, or take masks_from 'scores'"
                )
        if 0 < self.gamma < 1:
            found.append(
                f"gamma is {self.gamma}; with log_probs expected 0 or at least 1: between, slopes are infinite"
            )
        return found

    @property
    def request(self) -> AttentionRequest:
        """The attention to capture in the expert block."""
        scores = self.masks_from == "scores"
        return AttentionRequest(scores=scores, probs=not scores, mean_heads=self.targets == "classes")


class MagnetBatch(NamedTuple):
    """Noised images, the conditioning of their prompts, and their masks.

    Attributes:
      images: noised images, each at its own noise level.
      texts: conditioning of the prompts; CLIP's tokens come first.
      masks: masks of any size, in a fixed number of rows.
      real: which of the rows hold a mask.
      averaging: weights of the prompt's tokens in each mask's class (see `targets.class_maps`); None for `matching`.
    """

    images: NoisedImages
    texts: TextConditioning
    masks: Bool[Array, "batch masks mask_height mask_width"]
    real: Bool[Array, "batch masks"]
    averaging: Float[Array, "batch masks clip_tokens"] | None = None


def magnet_loss(
    mmdit: MMDiT,
    batch: MagnetBatch,
    objective: MagnetObjective,
    *,
    block: int,
    head: MaskHead | None = None,
    options: ForwardOptions = DEFAULT_OPTIONS,
) -> tuple[Float[Array, ""], dict[str, Float[Array, ""]]]:
    """Returns the loss of a batch and its parts: `velocity`, `focal` and `dice`, each before its weight.

    Gradients reach the parameters in two ways: through the velocity, and through the captured maps of `block`. Layers
    after the queries and keys of that block learn from the velocity alone.

    Args:
      block: the expert block, whose attention is compared with the masks.
      head: the mask head, given if and only if the objective has `mask_head: conv`.
      options: how blocks are computed; the objective replaces the attention request in it.

    Raises:
      ValueError: objective, head and batch do not fit together; also as `MMDiT.__call__`.
    """
    _check(objective, batch, head)
    images, options = batch.images, replace(options, request=objective.request)
    predicted, records = velocity(mmdit, images, batch.texts, capture=(block,), options=options)
    masks = attention_losses(records[block], batch, objective, images.grid(mmdit.config.patch_size), head)
    flow = velocity_loss(predicted, velocity_target(images.latents, images.noise)).mean()
    weighted = objective.focal_weight * masks.focal + objective.dice_weight * masks.dice
    return objective.velocity_weight * flow + weighted, {"velocity": flow, "focal": masks.focal, "dice": masks.dice}


def attention_losses(
    attention: JointAttention,
    batch: MagnetBatch,
    objective: MagnetObjective,
    grid: tuple[int, int],
    head: MaskHead | None = None,
) -> MaskLosses:
    """Returns the mask losses of a record made with `objective.request`; `grid`: rows and columns of image tokens."""
    focal: dict[str, Any] = {"alpha": objective.alpha, "gamma": objective.gamma, "focal": objective.focal}
    if objective.targets == "matching":
        assert attention.scores is not None
        costs = {"focal_cost": objective.focal_cost, "dice_cost": objective.dice_cost}
        maps = matched_maps(attention.scores, batch.masks, batch.real, grid, head, **costs, **focal)
        return mask_losses(maps, batch.masks, batch.real, **focal)
    assert batch.averaging is not None
    if objective.masks_from == "log_probs":
        assert attention.probs is not None
        scores = class_maps(attention.probs, batch.averaging, grid)
        return class_losses(scores, batch.masks, batch.real, gamma=objective.gamma)
    assert attention.scores is not None
    maps = class_maps(attention.scores, batch.averaging, grid, head)
    return mask_losses(maps, batch.masks, batch.real, **focal)


def _check(objective: MagnetObjective, batch: MagnetBatch, head: MaskHead | None) -> None:
    if (batch.averaging is None) != (objective.targets == "matching"):
        found = "no averaging" if batch.averaging is None else "averaging"
        raise ValueError(
            f"targets is {objective.targets!r} and the batch has {found}: classes are found in the prompt by it, and "
            "masks without classes have none"
        )
    if (head is None) != (objective.mask_head is None):
        raise ValueError(
            f"mask_head is {objective.mask_head!r} and {'no' if head is None else 'a'} head was given: "
            "expected a MaskHead with mask_head 'conv', and only then"
        )
