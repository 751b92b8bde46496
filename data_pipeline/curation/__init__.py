"""What stays: measures, scores, thresholds, and duplicates of three kinds."""
