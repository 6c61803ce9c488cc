"""Measures of the transformer's attention and of its pictures: attention shares, and CLIP scores."""
