"""A Flower app that sends a model there and back, without training."""
