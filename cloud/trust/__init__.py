"""Certificates: the cloud's own, those of devices, and the list of revoked ones."""
