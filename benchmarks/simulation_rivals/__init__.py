"""One module per system, run in a separate process: `python -m benchmarks.simulation_rivals.NAME WORKLOAD ...`.

Each prints one line of JSON at its end: the seconds of each round and the accuracy after the last.
"""
