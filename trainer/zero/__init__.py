"""The only part of the trainer that knows DeepSpeed."""
