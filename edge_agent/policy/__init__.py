"""The device's own policy: when it works for the fleet. It has the last word over what the cloud asks."""
