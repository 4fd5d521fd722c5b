"""Checkpoints: which run they belong to, whether they are whole, saving and loading them."""
