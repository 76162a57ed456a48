"""What every layer uses: buffers, extents, attributes, file I/O."""
