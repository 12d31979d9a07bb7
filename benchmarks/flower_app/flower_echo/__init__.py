"""A Flower app that returns the model unchanged, without training."""
