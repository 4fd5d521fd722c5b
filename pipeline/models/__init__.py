"""Causal language models: loading, sizes, output heads, losses and generation, shared by both stages."""
