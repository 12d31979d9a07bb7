"""Samples: in memory, or read from a Dataset as they are needed; and how a user's values become tensors."""
