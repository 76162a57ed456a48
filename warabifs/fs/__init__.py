"""File system semantics over a target, independent of FUSE."""
