"""Evaluate a student: on a cache, on HumanEval, on tasks of lm-evaluation-harness."""
