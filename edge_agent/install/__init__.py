"""The agent as a service, and looking at it: install, doctor, status."""
