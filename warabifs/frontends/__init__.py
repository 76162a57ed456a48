"""How requests of programs reach the file system."""
