"""Studies: sweeps over settings, checkpoints, and what a simulation came to."""
