"""Worker processes, for simulated clients and Flower apps: started, heard, replaced, ended by one pool."""
