"""The largest read or write request."""

from __future__ import annotations

MAX_WRITE = 1024 * 1024
"""Bytes in one read or write."""
