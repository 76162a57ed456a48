"""The metadata of a target in SQLite: inodes, names, attributes and checksums."""
