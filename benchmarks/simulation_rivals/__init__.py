"""One module a contestant, run as a process of its own: `python -m benchmarks.simulation_rivals.NAME WORKLOAD ...`.

Each prints one line of JSON at its end: the seconds of each round and the accuracy after the last.
"""
