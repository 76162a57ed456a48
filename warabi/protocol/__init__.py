"""Addresses, transports, and the wire protocol without I/O."""
