"""Language models divided by their blocks, for generation: stage folders, their computation, sampling."""
