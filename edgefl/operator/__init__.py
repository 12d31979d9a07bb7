"""The operator's side: a client of the cloud's HTTPS plane, and the commands on it."""
