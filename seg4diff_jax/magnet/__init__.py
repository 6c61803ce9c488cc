"""MAGNET: fine-tuning that makes the expert block's attention agree with masks (Seg4Diff, section 4).

Pure functions on arrays. `objective.magnet_loss` is the whole of it; what the authors' release does otherwise than the
paper says is behind options, each named where it is described.
"""
