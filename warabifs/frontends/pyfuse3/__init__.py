"""The front end that has pyfuse3, and so libfuse, speak the kernel's protocol."""
