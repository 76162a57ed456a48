"""The ``warabi`` command: archives, scrub and fsck."""
