"""Clients of the provider's host, which reach regions by shared memory."""
