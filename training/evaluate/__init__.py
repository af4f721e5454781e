"""Adapters -> pictures, scores and figures."""
