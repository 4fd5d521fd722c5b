"""Labels in another vocabulary: from a teacher's distributions over its tokens to those over a student's."""
