"""An engine of worker processes, one thread each."""
