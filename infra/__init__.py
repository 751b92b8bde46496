"""Storage, results, logging and launching. Imports no sibling package."""
