"""The ``warabi`` command."""
