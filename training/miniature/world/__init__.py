"""A drawn world of known factors: its pictures, words and samples."""
