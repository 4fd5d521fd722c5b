"""Training examples from source code, from models behind an API, or from a model on this machine."""
