"""Work on Ray: stages and their columns, units of work, what is proven, what is reported."""
