"""The small models, and their training."""
