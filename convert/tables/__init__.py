"""Name tables between PyTorch's tensors and our parameters: one file per model, used in both directions."""
