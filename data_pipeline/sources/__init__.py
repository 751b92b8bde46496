"""Where raw images come from, and how a source becomes canonical shards."""
