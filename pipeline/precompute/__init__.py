"""Stage 1: label every example once with the teacher."""
