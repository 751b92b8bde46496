"""Captions: the column, and the captioners that write it."""
