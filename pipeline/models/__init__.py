"""What both stages know of a causal language model."""
