"""What a device and the cloud say to each other while they train a model in parts."""
