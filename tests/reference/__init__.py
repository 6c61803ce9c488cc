"""PyTorch: what every number here is compared with."""
