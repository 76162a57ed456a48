"""Targets: regions, names, times, durability."""
