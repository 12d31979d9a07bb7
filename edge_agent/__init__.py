"""The agent on a device: link, store, trainer, updater, serving."""
