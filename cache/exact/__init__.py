"""Exact labels: the teacher's hidden states in few bits, and its head, stored once per cache."""
