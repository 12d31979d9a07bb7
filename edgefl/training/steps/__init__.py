"""How a local training step is taken: gradients, memory layout, and the optimizer with what it keeps."""
