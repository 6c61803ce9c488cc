"""Runs PyTorch and JAX side by side on a user's own weights."""
