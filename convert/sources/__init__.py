"""Checkpoints in all their forms, opened."""
