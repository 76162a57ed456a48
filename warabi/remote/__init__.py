"""Links to a target behind a connection."""
