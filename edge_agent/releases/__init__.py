"""Releases on the device: two slots, trials, and the update to what the fleet wants."""
