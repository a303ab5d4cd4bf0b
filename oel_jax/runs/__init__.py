"""A run: its record, its directory, its policies, checkpoints and numbers."""
