"""What metrics share: what a metric is, the judges, the prompts that are scored."""
