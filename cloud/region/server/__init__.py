"""A region's own process: servers for the devices below (`process`), and one participant above (`uplink`, `work`)."""
