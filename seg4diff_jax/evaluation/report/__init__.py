"""The page of an evaluation: plots, pictures and tables."""
