"""A look inside the transformer: where attention goes, and what follows from it."""
