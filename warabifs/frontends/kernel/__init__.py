"""The FUSE protocol on ``/dev/fuse``, without a library."""
