"""Archives of whole targets.  ``survey`` and ``graft`` are operations that run at the target;
``export`` and ``restore`` are their clients."""
