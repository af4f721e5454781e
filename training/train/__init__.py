"""Features -> checkpoints -> a file."""
