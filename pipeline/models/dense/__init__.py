"""Whole distributions as targets: the teacher's logits of some rows at a time, and the loss against them."""
