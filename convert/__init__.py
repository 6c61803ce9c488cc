"""PyTorch checkpoints to JAX and back, and the proof that the numbers stay the same."""
