"""The control plane: MQTT broker, its rights, and the cloud's link to it."""
