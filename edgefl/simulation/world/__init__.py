"""The world of a simulation: its clients, their data, their machines, and its clock."""
