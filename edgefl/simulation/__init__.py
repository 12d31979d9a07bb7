"""Simulation: the rounds, rules and guards of production over many clients in one machine."""
