"""From shards to batches: the order of samples, reading, collating."""
