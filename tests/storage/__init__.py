"""Backends and what lies on top of them."""
