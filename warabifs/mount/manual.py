"""The manual page mount.warabifs(8), generated from the tables for ``--help`` and parsing.

``python -m warabifs.mount.manual DIRECTORY`` writes all manual pages of the distribution.
"""

from __future__ import annotations

import sys
from pathlib import Path

import warabi
from warabi.tools.cli import manual
from warabi.tools.cli.manual import roff
from warabifs.mount.options import KERNEL, rows

_HEAD = """\
.TH MOUNT.WARABIFS 8 "" "warabifs @VERSION@" "System Administration"
.SH NAME
mount.warabifs \\- show every region of a Warabi target as a file
.SH SYNOPSIS
.B mount \\-t warabifs
.RB [ \\-o
.IR OPTION [, OPTION ...]]
.I SOURCE MOUNTPOINT
.PP
.B mount.warabifs
.I SOURCE MOUNTPOINT
.RB [ \\-f ]
.RB [ \\-r ]
.RB [ \\-o
.IR OPTION [, OPTION ...]]
.SH DESCRIPTION
A target is a store of regions, runs of bytes.
Mounted, every region is a file, and every file a region.
.I SOURCE
is one of these:
.TP
.B memory:
An empty target in memory, gone when it is unmounted.
.TP
.BI file: /path/of/the/target
The target at that path, made when it is missing.
.TP
.BI na+sm:// PID\\-N
The target of a provider on this host.
.TP
.BI ofi+tcp:// host:port
The target of a provider that is reached by TCP.
.TP
.IR NAME :[ PATH ]
A target of the backend of that name, of an installed package.
.PP
The command returns when the mount can be used.
.B mount.warabifs \\-f
stays in the foreground; called by
.BR mount (8),
.B \\-f
checks everything and mounts nothing, and
.B \\-\\-foreground
is the other.
.SH OPTIONS
.SS Of warabifs
"""
_TAIL = """\
.SH UNMOUNTING
.BR umount (8)
returns when everything is persisted, or says what is not, and exits with 1 then.
It waits for a minute at most.
With
.B \\-l
it does not wait for files that are open; the mount's process ends when the last one is closed.
.B fusermount3 \\-u
returns when the kernel has let go, while the process may still be persisting; the next mount of
the target waits for it.
.SH REMOUNTING
.B mount \\-o remount
changes
.BR ro ,
.BR rw ,
.B noatime
and the other options of the kernel's, and nothing else.
.SH EXIT STATUS
0 when the mount can be used; 1, with one line on standard error, when it could not be made; 2 when
the command line is wrong.
.SH FILES
.TP
.I /etc/fstab
.nf
file:/srv/target     /mnt/a  warabifs  noauto,user           0 0
ofi+tcp://host:5555  /mnt/b  warabifs  _netdev,provider_id=3 0 0
.fi
.TP
.I /etc/fuse.conf
Has
.B user_allow_other
where users other than root may give
.BR allow_other .
.SH DIAGNOSTICS
A mount in the background logs to the system log, or to the file that
.BI log= FILE
names.
.B warabifs doctor
looks for what keeps mounts from working.
.SH SEE ALSO
.BR mount (8),
.BR umount (8),
.BR fstab (5),
.BR fusermount3 (1)
"""


def _entry(left: str, right: str) -> str:
    name, equals, value = left.partition("=")
    if equals and value and "," not in left:
        shown = f".BI {roff(name)}= {roff(value)}"
    else:
        shown = f'.B "{roff(left)}"'
    return f".TP\n{shown}\n{roff(right)}\n"


def page() -> str:
    """Return the manual page."""
    return "".join(
        (
            _HEAD.replace("@VERSION@", warabi.__version__),
            *(_entry(left, right) for left, right in rows()),
            ".SS Of every file system\n",
            *(_entry(left, right) for left, right in KERNEL.items()),
            _TAIL,
        )
    )


def pages() -> dict[str, str]:
    """Return all manual pages, by their files' names."""
    from warabi.tools.cli.main import main
    from warabifs.mount.cli import main as mount_main

    return {
        "warabi.1": manual.page(main, ".BR warabifs (1),\n.BR mount.warabifs (8)"),
        "warabifs.1": manual.page(mount_main, ".BR warabi (1),\n.BR mount.warabifs (8)"),
        "mount.warabifs.8": page(),
    }


if __name__ == "__main__":
    for name, text in pages().items():
        (Path(sys.argv[1]) / name).write_text(text)
