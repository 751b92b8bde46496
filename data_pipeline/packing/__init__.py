"""From columns to training shards: the hashed plan, shards, generations, the index."""
