"""Commands that look at a finished dataset: inspect and verify."""
