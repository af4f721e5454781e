"""The miniature in other people's formats and sizes."""
