"""Training: one loop for every task, and the tasks."""
