"""The miniature: a small SD3 trained on this package's synthetic scenes, in diffusers' format."""

from pathlib import Path

CHECKPOINT = Path(__file__).parent / "checkpoint"
"""What `seg4diff_jax.load("miniature")` loads."""
