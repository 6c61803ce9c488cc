"""Data sets as random-access sources, and the synthetic world that the miniature is trained on."""
