"""The device's side of training in parts: its layers in the trainer, its connection in the agent."""
