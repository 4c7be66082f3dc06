"""Several replies at once, the server, structured replies and sessions."""
