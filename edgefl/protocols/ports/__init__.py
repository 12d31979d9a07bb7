"""Listening ports with limits: which clients may connect, how many, and for how long."""
