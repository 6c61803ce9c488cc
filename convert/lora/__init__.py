"""Low-rank adapters of every tool, read and written."""
