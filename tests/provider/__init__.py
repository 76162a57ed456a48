"""Engines, providers and clients, over every transport."""
