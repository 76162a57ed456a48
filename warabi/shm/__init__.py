"""Shared memory through which processes of one host access regions without messages."""
