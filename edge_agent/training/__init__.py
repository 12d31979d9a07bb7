"""Taking part in rounds: plans, bundles, the trainer process."""
