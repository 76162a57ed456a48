"""Inodes, names, attributes and checksums, kept in SQLite."""
