"""Data sets as random-access sources."""
