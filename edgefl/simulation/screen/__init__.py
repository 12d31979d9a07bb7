"""Simulations on the screen, as plots, and as TensorBoard event files."""
