"""Train a task: `python train.py --config configs/miniature/autoencoder.yaml [--resume] [--run.steps=1000 ...]`."""

import signal
import sys

if __name__ == "__main__":
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # Ctrl-C ends the imports, and when pressed twice a run, at once
    from seg4diff_jax.command_line import main

    sys.exit(main(["train", *sys.argv[1:]]))
