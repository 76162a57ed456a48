"""The command ``mount.warabifs``: options, mounting, unmounting, and related commands."""
