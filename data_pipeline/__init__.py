"""From raw images to training shards on Ray Data, and the loader that reads them back."""
