"""The commands: what `edgefl run`, `edgefl simulate` and the others read, show and write."""
