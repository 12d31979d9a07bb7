"""`edgefl offload`: its commands, and the work of a plan."""
