"""Zero-shot evaluation on data sets: batches, counting in compiled programs, scores, and results with baselines."""
