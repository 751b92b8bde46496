"""Everything that is refused before any work."""
