"""The synthetic world that the miniature was trained on."""
