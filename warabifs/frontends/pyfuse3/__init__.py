"""The front end on pyfuse3 and libfuse."""
