"""Tiny models with the real layouts and random weights."""
