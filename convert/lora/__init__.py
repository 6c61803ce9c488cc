"""Reads low-rank adapters of many tools, and writes them."""
