"""Models that are too large for a device, split between device and cloud: cuts, stages, wire formats, plans."""
