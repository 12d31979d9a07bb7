"""Updates of devices, from their first byte until they are durable."""
