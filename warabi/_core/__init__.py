"""Shared basics of every layer: buffers, extents, attributes, file I/O."""
