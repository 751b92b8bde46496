"""Many runs, each by the command a person would type."""
