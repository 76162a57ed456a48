"""Links to a target in the same process."""
