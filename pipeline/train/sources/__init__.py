"""Where a run of stage 2 takes its examples from: caches, data files, or several of them mixed."""
