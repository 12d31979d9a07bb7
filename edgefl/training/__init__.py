"""Local training on a client's own samples."""
