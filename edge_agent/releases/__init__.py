"""Releases on the device: two slots for each model, trials, and updates to the desired release."""
