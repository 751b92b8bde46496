"""T2I-CompBench: formulas, what judges saw, layouts and stored evidence, the metric, the commands."""
