"""An engine on a Ray cluster: the pool's workers as actors, on one machine or many."""
