"""The whole paper in small, on one page: each step of it is one file, in the paper's order."""
