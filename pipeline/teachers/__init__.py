"""Teachers: models that turn token ids into sparse labels."""
