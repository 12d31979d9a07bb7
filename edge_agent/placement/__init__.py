"""Models that the device shares with a stage server: where their layers run, and what answers without the cloud."""
