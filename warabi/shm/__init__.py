"""Shared memory by which processes of one host reach regions without messages."""
