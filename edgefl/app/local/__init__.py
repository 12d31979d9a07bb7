"""`edgefl local`: a fleet on this machine that stays until it is stopped."""
