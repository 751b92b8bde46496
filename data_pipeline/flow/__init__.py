"""The run: what is missing, units of work on Ray, what no longer fits, what is reported."""
