"""Computes what a training step needs of TPUs that this machine does not have: `seg4diff plan`."""
