"""Converts checkpoints from PyTorch to JAX and back, and verifies that the numbers stay the same."""
