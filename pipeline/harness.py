"""Tasks of lm-evaluation-harness, through its Python API. Extra ``lm-eval``."""
