"""Studies: sweeps over settings, checkpoints, and results."""
