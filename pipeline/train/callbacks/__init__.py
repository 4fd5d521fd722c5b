"""What watches, logs and stops a run of stage 2."""
