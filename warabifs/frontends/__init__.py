"""Front ends: what a mount speaks FUSE with.

``base`` says what a front end is, ``registry`` which there are.
"""
