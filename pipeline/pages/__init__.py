"""Pages to look at in a browser, each one file without server or network: a cache's labels, a report of runs."""
