"""Measures this project beside its peers; ``tools/bench`` runs it."""
