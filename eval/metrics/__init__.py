"""The metrics, one file or folder each; `registry.py` lists them."""
