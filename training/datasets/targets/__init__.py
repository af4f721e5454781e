"""Targets that a source does not hold: the settings of their generation, and what makes them."""
