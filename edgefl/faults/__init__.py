"""Deterministic simulation of a fleet under faults: the real cloud, regions and agents in one thread, on virtual time.

A seed decides the topology, the job, the faults and every order of events; `python -m edgefl.faults --seeds 10000` runs
many. An auditor that shares no code with them computes what the models must be.
Invariant: the same seed gives the same trace, byte for byte.
"""
