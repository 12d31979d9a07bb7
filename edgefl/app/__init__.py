"""The `edgefl` command, the demo, and a whole fleet on one machine."""
