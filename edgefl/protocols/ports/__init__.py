"""Listening ports with limits: who may connect, how many, and for how long."""
