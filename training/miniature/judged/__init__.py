"""What the miniature's models do, by the oracle that knows the truth."""
