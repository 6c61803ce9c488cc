"""Zero-shot evaluation on data sets: batches, the compiled path, scores, and what a score is worth."""
