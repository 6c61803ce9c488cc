"""Train a task: `python train.py --config configs/miniature/autoencoder.yaml [--resume] [--run.steps=1000 ...]`."""

import sys

from seg4diff_jax.training.command import main

if __name__ == "__main__":
    sys.exit(main())
