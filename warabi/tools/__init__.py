"""The ``warabi`` command and what it does: archives, scrub, fsck."""
