"""The miniature: a small SD3 trained on this package's synthetic scenes, its tasks and their world."""
