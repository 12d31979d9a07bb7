"""Text generation on the device, in a process of its own: the head of a language model, its tail in the cloud."""
