"""What a run's folder holds."""
