"""A Flower app in TensorFlow/Keras."""
