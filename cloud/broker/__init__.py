"""The control plane: the MQTT broker, its access rights, and the cloud's link to it."""
