"""The bytes that are stored: a sample, a parquet table, the index of a split, manifests and dataset.json."""
