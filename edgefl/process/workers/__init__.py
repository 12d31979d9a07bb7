"""Worker processes for simulated clients and Flower apps; one pool starts, replaces and ends them."""
