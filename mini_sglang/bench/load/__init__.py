"""Load on a server: what is sent and when, and what came of it."""
