"""Weights in and out, in our names and in others'."""
