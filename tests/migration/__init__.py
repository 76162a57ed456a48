"""Targets that move to another provider."""
