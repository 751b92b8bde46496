"""Scaling laws: fits, intervals and their coverage, correlations."""
