"""Benchmarks of the API and of mounts, next to other systems; ``tools/bench`` runs them."""
