"""Flower apps as their users write them: folders, habits, logs, and whose fault an error is."""
