"""Waiting in Trio programs: busy polling, worker threads, asynchronous fsync."""
