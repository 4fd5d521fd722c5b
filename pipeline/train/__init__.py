"""Stage 2: train students from the cache."""
