"""Read, plot and compare the folders of runs."""
