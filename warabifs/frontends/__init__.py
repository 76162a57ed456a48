"""Front ends: implementations of the FUSE protocol for mounts.

``base`` says what a front end is, ``registry`` which there are.
"""
