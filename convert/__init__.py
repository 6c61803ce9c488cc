"""PyTorch checkpoints to JAX and back, and what verifies that the numbers stay the same."""
