"""The page: every finding of the paper beside what was found here, then each step with its plots and pictures."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from pathlib import Path

from PIL import Image

from seg4diff_jax.reporting.inline_pictures import photograph
from seg4diff_jax.reporting.page_templates import page_environment
from seg4diff_jax.reproduction.parts import Claim, Part, decided

LONGEST = 1400
"""Pixels along the longer side of a picture."""
ELSEWHERE = [
    Claim(
        "Tables 1, 2",
        "mIoU on the published sets, beside baselines on CLIP and older diffusion models.",
        "All the sets and the published weights are at hand.",
        "evaluate.py measures them one by one: docs/reproduce.md",
        "not testable here",
    ),
    Claim(
        "Table 4",
        "MAGNET on COCO raises attributes, numeracy and complex scenes of T2I-CompBench++, and lowers relations.",
        "The benchmark's own scorers are at hand.",
        "seg4diff generate --layout compbench makes their pictures",
        "not testable here",
    ),
]
"""Findings that one run does not test."""


def reproduction_page(parts: Sequence[Part], folder: Path, *, model: str, about: str) -> str:
    """Returns the page.

    Args:
      folder: where the pictures of the parts are.
      model: its name.
      about: what was measured, the rest of a sentence.
    """
    claims = [*(claim for part in parts for claim in part.claims), *ELSEWHERE]
    counts = Counter(claim.verdict for claim in claims)
    pictures = [
        [photograph(caption, Image.open(folder / file).convert("RGB"), LONGEST) for caption, file in part.pictures]
        for part in parts
    ]
    template = page_environment("reproduction/templates").get_template("reproduction.html.jinja")
    tiles = [(verdict, counts[verdict]) for verdict in (decided(True), decided(False), decided(None))]
    sections = list(zip(parts, pictures, strict=True))
    return template.render(model=model, about=about, claims=claims, tiles=tiles, sections=sections) + "\n"
