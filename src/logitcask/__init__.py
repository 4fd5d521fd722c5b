"""Offline logit distillation: run the teacher once into a cache of sparse soft labels, train students from it."""
