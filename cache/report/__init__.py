"""What a cache holds, as text, figures and pictures."""
