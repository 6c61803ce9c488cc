"""MAGNET: fine-tuning that makes the expert block's attention agree with masks (Seg4Diff, section 4).

`objective.magnet_loss` is the whole loss, as a pure function on arrays. Where the authors' release differs from the
paper, an option selects the release's way; each option's description says so.
"""
