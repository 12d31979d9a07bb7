"""`edgefl simulate` in a separate process, so that user code cannot end the process that holds the results."""
