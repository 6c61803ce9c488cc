"""The expert block, found in several ways: by labels, and by hints that need none."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from seg4diff_jax.reproduction import attention_budget, components, masks, perturbation
from seg4diff_jax.reproduction.parts import Claim, Measured, Part, Step, Table, decided
from seg4diff_jax.reproduction.subject import SHOWN_LEVELS, Subject


def present(subject: Subject, measured: Mapping[str, Measured]) -> Part:
    found = found_by(subject, measured)
    by_label, hints = found["mIoU by labels"], {way: block for way, block in found.items() if way != "mIoU by labels"}
    agree = [way for way, block in hints.items() if block == by_label]
    rows = [(way, [f"block {block}"]) for way, block in found.items()]
    rows.append(("the checkpoint's own", [f"block {subject.expert}"]))
    return Part(
        "The expert block, found in several ways",
        "Each way names the block that stands out most by it. Only the first needs labels.",
        [
            Claim(
                "3.3, Fig. 4, 5, 8",
                "Value norms, perturbation and segmentation point to the same block.",
                "The largest text norm, the largest loss of CLIP-I and the highest mIoU are of one block.",
                f"{len(agree)} of {len(hints)} hints agree with the labels: {', '.join(agree) or 'none'}",
                decided({"largest text norm", "CLIP-I lost"} <= {*agree} if "CLIP-I lost" in hints else None),
            )
        ],
        tables=[Table("By", ["block"], rows, 0)],
    )


def found_by(subject: Subject, measured: Mapping[str, Measured]) -> dict[str, int]:
    """Returns the block that each way names."""
    level = str(SHOWN_LEVELS[0])
    levels = {str(key): values for key, values in measured[attention_budget.STEP.name]["levels"].items()}
    budget, ious = levels[level], masks.mean_ious(measured[masks.STEP.name], subject.pipe.expert_step)
    scores, objects = measured[perturbation.STEP.name]["scores"], measured[components.STEP.name]["objects"]
    ways = {
        "mIoU by labels": ious,
        f"most attention on text, level {level}": budget["text"],
        f"most attention on the prompt's words, level {level}": budget["words"],
        "largest text norm": attention_budget.ratios(budget),
        **({"components by classes": objects} if objects else {}),
        **({"CLIP-I lost": -perturbation.by_block(scores, "blurred", "CLIP-I").mean(axis=0)} if scores else {}),
    }
    return {way: int(np.nanargmax(values)) for way, values in ways.items()}


STEP = Step("expert", "the expert block", None, present)
