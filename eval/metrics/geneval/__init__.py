"""GenEval: the 553 prompts, the decision logic, layouts and stored detections, the metric, the commands."""
