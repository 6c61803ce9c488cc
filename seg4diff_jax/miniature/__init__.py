"""The miniature: a small SD3 trained on this package's synthetic scenes."""
