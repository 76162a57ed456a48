"""Backup and repair."""
