"""Where a cache lies: folders, .zip files, object stores, and the right to write there."""
