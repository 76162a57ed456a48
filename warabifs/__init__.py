"""A mount that shows every region of a Warabi target as a file."""
