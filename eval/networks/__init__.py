"""The networks that judge, each by the path of its checkpoint."""
