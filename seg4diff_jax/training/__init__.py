"""Training: one loop for every task, with its optimizers, checkpoints and logs."""
