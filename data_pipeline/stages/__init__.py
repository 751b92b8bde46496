"""What a stage is, the columns that stages write, and what the driver keeps of them on scratch disk."""
