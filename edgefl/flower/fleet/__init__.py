"""Flower apps on a fleet of real devices."""
