"""Tiers: a cloud's side of the regions below it (`children`, `service`, `sums`); `server` is a region's own process."""
