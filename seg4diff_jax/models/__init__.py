"""The networks: Flax NNX modules and pure functions on arrays. No files, no tokenizers, no printing."""
