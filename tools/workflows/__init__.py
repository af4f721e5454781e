"""The workflows that the pack ships, written from the host's own schemas."""
