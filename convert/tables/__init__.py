"""Which PyTorch tensor is which of ours: one file per model, read in both directions."""
