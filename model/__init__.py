"""MM-DiT, its objective and its encoders. Imports no sibling package; reads local paths only."""
