"""Exact labels in stage 1: the teacher's head, the basis of its hidden states, and their codes."""
