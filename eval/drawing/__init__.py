"""Exported weights and prompts to pictures."""
