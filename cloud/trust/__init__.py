"""The cloud's certificates: its own, those of devices, and who is revoked."""
