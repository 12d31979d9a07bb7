"""Flower apps as their users write them: folders, options in Flower's syntax, logs, and whose fault an error is."""
