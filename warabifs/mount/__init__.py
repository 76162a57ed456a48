"""``mount.warabifs``: options, mounting, unmounting, and the commands around it."""
