"""A target: catalogue and storage as one, with locks, commits and leases."""
