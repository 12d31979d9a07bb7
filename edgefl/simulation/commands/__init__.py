"""`edgefl simulate` and what it was asked for."""
