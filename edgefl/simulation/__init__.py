"""Simulation: the rounds, rules and guards of production, with many clients on one machine."""
