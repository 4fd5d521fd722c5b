"""Storage of caches: folders, .zip files and object stores, and the right to write there."""
