"""The demo: the whole job on a real teacher, in a few minutes on a laptop."""
