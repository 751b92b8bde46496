"""From shares to weights files: whole weights, adapters, what they say about themselves."""
