"""Opens checkpoints of every format."""
