"""Teachers: what turns token ids into sparse labels."""
