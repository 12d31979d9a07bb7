"""Training a model in parts: on a device, in the cloud, and with a second cut on the device again."""
