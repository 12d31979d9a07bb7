"""What was learnt by adapters, as a release on its base, as factors of a chosen rank, and in peft's format."""
