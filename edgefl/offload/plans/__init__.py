"""Where a model is best split: times, links, memory, the choice and when it is replaced."""
