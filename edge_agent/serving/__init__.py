"""Predictions on the device, in a process of their own: the Open Inference Protocol."""
