"""Jobs that share a fleet: which may run, which devices each gets, what is learnt of them, pausing and continuing."""
