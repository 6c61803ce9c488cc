"""Zero-shot open-vocabulary segmentation, scored: `python evaluate.py [--model MODEL] [--data.root DIR] [--help]`.

Without arguments: the miniature on 500 held-out synthetic scenes.
"""

import sys

from seg4diff_jax.command_line import main

if __name__ == "__main__":
    sys.exit(main(["evaluate", *sys.argv[1:]]))
