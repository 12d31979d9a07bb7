"""Engines: ways to train the clients of a round on this machine, or on a cluster."""
