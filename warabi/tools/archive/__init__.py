"""Whole targets as one stream: ``survey`` and ``graft`` run where the target is, as operations
of the table; ``export`` and ``restore`` are their clients."""
