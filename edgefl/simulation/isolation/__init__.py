"""`edgefl simulate` in a process of its own, so that user code cannot end what holds the results."""
