"""A teacher whose labels are in a student's vocabulary."""
