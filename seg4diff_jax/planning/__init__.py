"""What a training step will need of a machine that is not here: `seg4diff plan`."""
