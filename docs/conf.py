"""Sphinx builds the manual from this folder: ``just docs``."""

project = "Logitcask"
author = "The authors of Logitcask"
extensions = ["myst_parser"]
exclude_patterns = ["_build"]
html_theme = "furo"
smartquotes = False  # they make one dash of an option's two
html_title = "Logitcask"
html_show_copyright = False
myst_enable_extensions = ["deflist"]
myst_heading_anchors = 3
