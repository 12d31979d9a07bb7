"""The machine that a simulation runs on: processes, threads, time, network and disks, all driven by one seed."""
