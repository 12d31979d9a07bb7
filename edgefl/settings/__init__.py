"""Settings of a job that are tables of their own: see `edgefl.config`."""
