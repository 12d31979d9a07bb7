"""Tiers: a cloud's side of the regions below it (`children`), and a region's own (`process`, `uplink`, `work`)."""
