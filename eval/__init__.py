"""Judges exported weights and writes reports. Never imports the trainer: they meet in files."""
