"""``warabifs doctor``: diagnoses why mounts do not work here, and suggests the remedy.

Each check yields findings.  A *fault* keeps this user from mounting, or has broken a mount; a
*hint* concerns features that not every user needs.  Nothing is changed, except that the directory
for local sockets is created; mounts are accessed only by another process with a time limit.
"""

from __future__ import annotations

import os
import re
import resource
import shlex
import shutil
import stat
import subprocess
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Literal

import click

from warabi._core.mountinfo import KIND, mounts
from warabi._core.tuning import DOCTOR_ANSWER
from warabi.errors import PermissionDenied
from warabi.protocol import socket_directories
from warabifs.mount import install

_DEVICE = Path("/dev/fuse")
_FILES = 4096  # open files that suffice for targets of many regions
_SYS_ADMIN = 21  # the number of CAP_SYS_ADMIN


@dataclass(frozen=True)
class Finding:
    """The result of a check, with the remedy if there is a problem."""

    level: Literal["ok", "hint", "fault"]
    text: str
    remedy: str = ""


_ok, _hint, _fault = (partial(Finding, level) for level in ("ok", "hint", "fault"))


def _kernel() -> Iterator[Finding]:
    known = re.findall(r"\bfuse$", Path("/proc/filesystems").read_text(), re.MULTILINE)
    if known:
        yield _ok("the kernel has FUSE")
    else:
        yield _fault("the kernel module fuse is not loaded", "modprobe fuse")


def _device() -> Iterator[Finding]:
    try:
        info = _DEVICE.stat()
    except FileNotFoundError:
        yield _fault(
            f"{_DEVICE} does not exist",
            f"modprobe fuse, or mknod -m 666 {_DEVICE} c 10 229; for a container: --device"
            f" {_DEVICE}",
        )
        return
    if not stat.S_ISCHR(info.st_mode) or os.major(info.st_rdev) != 10:
        yield _fault(
            f"{_DEVICE} is not FUSE's device",
            f"rm {_DEVICE} && mknod -m 666 {_DEVICE} c 10 229",
        )
        return
    mode = stat.S_IMODE(info.st_mode)
    if not os.access(_DEVICE, os.R_OK | os.W_OK):
        yield _fault(
            f"{_DEVICE} has mode {mode:04o}, and this user may not open it",
            f"chmod 0666 {_DEVICE}",
        )
    elif mode & 0o666 != 0o666:
        yield _hint(
            f"{_DEVICE} has mode {mode:04o}: other users cannot mount",
            f"chmod 0666 {_DEVICE}",
        )
    else:
        yield _ok(f"{_DEVICE} can be opened by every user")


def _fusermount() -> Iterator[Finding]:
    path = shutil.which("fusermount3")
    unusable = _hint if _may_mount() else _fault
    if path is None:
        yield _fault("fusermount3 is not in PATH", "apt-get install fuse3")
        return
    info = os.stat(path)
    if info.st_uid != 0 or not info.st_mode & stat.S_ISUID:
        yield unusable(
            f"{path} is not set-uid root: only root can mount",
            f"chown root {path} && chmod u+s {path}",
        )
    elif os.statvfs(path).f_flag & os.ST_NOSUID:
        yield unusable(
            f"{path} is on a file system mounted nosuid: only root can mount",
            f"mount -o remount,suid on the file system of {path}",
        )
    else:
        yield _ok(f"{path} is set-uid root")


def _status(name: str) -> str:
    """Return a field of ``/proc/self/status``; empty if it is missing."""
    text = Path("/proc/self/status").read_text()
    found = re.search(rf"^{name}:\s*(\w+)", text, re.MULTILINE)
    return found[1] if found else ""


def _may_mount() -> bool:
    return bool(int(_status("CapEff") or "0", 16) >> _SYS_ADMIN & 1)


def _privileges() -> Iterator[Finding]:
    if _may_mount():
        yield _ok("this process can mount directly")
    elif os.geteuid() == 0:
        yield _fault(
            "root here may not mount: the container lacks CAP_SYS_ADMIN",
            "start the container with --device /dev/fuse --cap-add SYS_ADMIN",
        )
    elif _status("NoNewPrivs") == "1":
        yield _fault(
            "no_new_privs is set: fusermount3 cannot gain privileges",
            "start the program without no_new_privs (systemd: NoNewPrivileges=no), or mount in a"
            " user namespace: unshare -Urm",
        )
    else:
        yield _ok("fusermount3 mounts for this user")


def _configuration() -> Iterator[Finding]:
    if os.geteuid() == 0:
        return
    try:
        text = Path("/etc/fuse.conf").read_text()
    except OSError:
        text = ""
    if re.search(r"^\s*user_allow_other\s*$", text, re.MULTILINE):
        yield _ok("users may give -o allow_other")
    else:
        yield _hint(
            "/etc/fuse.conf has no user_allow_other: -o allow_other is for root only",
            "echo user_allow_other >> /etc/fuse.conf",
        )


def _limits() -> Iterator[Finding]:
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)  # a mount raises its soft limit to this
    if hard == resource.RLIM_INFINITY or hard >= _FILES:
        yield _ok("a mount may have enough descriptors")
        return
    yield _hint(
        f"a mount may have {hard} descriptors: large targets are slower with few",
        f"raise nofile in /etc/security/limits.conf, systemd: LimitNOFILE={_FILES}",
    )


def _runtime_directory() -> Iterator[Finding]:
    chosen = os.environ.get("WARABI_RUNTIME_DIR")
    try:
        path = Path(chosen) if chosen else socket_directories.made(os.getuid())
        info = path.lstat()
    except FileNotFoundError:
        yield _ok(f"{chosen}, for local sockets, is created when needed")
        return
    except PermissionDenied as error:
        yield _fault(str(error), "set WARABI_RUNTIME_DIR to a directory of mode 0700 of this user")
        return
    if not stat.S_ISDIR(info.st_mode) or info.st_uid != os.getuid():
        yield _fault(
            f"{path}, for local sockets, is not a directory of this user",
            f"rm -rf {path}, or set WARABI_RUNTIME_DIR",
        )
    elif info.st_mode & 0o077:
        yield _fault(f"{path}, for local sockets, can be used by others", f"chmod 0700 {path}")
    else:
        yield _ok(f"{path}, for local sockets, is this user's")


def _helpers() -> Iterator[Finding]:
    helper = Path("/sbin/mount.warabifs")
    remedy = "warabifs install-helper"
    try:
        text = helper.read_text(errors="replace")
    except OSError:
        yield _hint(f"{helper} is missing: mount(8) and fstab cannot mount warabifs", remedy)
        return
    found = re.search(r"^exec (.+) -P -m warabifs.mount.helper", text, re.MULTILINE)
    if install.MARK not in text or found is None:
        yield _hint(f"{helper} is not part of warabifs", "remove it, then: " + remedy)
    elif not os.access(shlex.split(found[1])[0], os.X_OK):
        yield _fault(
            f"{helper} starts {found[1]}, which this user cannot run",
            f"install warabifs in a directory that every user can read, then: {remedy}",
        )
    else:
        yield _ok(f"{helper} starts {found[1]}")


def _log() -> Iterator[Finding]:
    if not Path("/dev/log").exists():
        yield _hint("there is no /dev/log: background mounts have no log", "-o log=FILE")


def _namespaces() -> Iterator[Finding]:
    for name, wrong, right in (
        ("/proc/sys/user/max_user_namespaces", "0", "user.max_user_namespaces=10000"),
        ("/proc/sys/kernel/unprivileged_userns_clone", "0", "kernel.unprivileged_userns_clone=1"),
        (
            "/proc/sys/kernel/apparmor_restrict_unprivileged_userns", "1",
            "kernel.apparmor_restrict_unprivileged_userns=0",
        ),
    ):  # fmt: skip
        path = Path(name)
        if path.exists() and path.read_text().strip() == wrong:
            yield _hint(
                f"{name} is {wrong}: unprivileged users cannot mount in a user namespace",
                f"sysctl {right}",
            )


def _mounts() -> Iterator[Finding]:
    for mount in mounts():
        if mount.kind != KIND:
            continue
        try:
            done = subprocess.run(
                ["stat", "-f", "--", mount.path], capture_output=True, timeout=DOCTOR_ANSWER,
                env={**os.environ, "LC_ALL": "C"},
            )  # fmt: skip
        except subprocess.TimeoutExpired:
            yield _fault(
                f"{mount.path}: {mount.source} does not answer",
                f"see its log; or detach it: fusermount3 -u -z {mount.path}",
            )
            continue
        if b"not connected" in done.stderr:
            yield _fault(
                f"{mount.path}: the process of {mount.source} has died",
                f"mount it again, or: fusermount3 -u {mount.path}",
            )
        elif done.returncode == 0:
            yield _ok(f"{mount.path}: {mount.source} answers")


CHECKS: tuple[Callable[[], Iterator[Finding]], ...] = (
    _kernel, _device, _fusermount, _privileges, _configuration, _limits,
    _runtime_directory, _helpers, _log, _namespaces, _mounts,
)  # fmt: skip


def main() -> int:
    """Print the results of all checks; return the exit status, 1 if there is a fault."""
    faults = 0
    for check in CHECKS:
        for finding in check():
            faults += finding.level == "fault"
            click.echo(f"{finding.level + ':':<6} {finding.text}")
            if finding.remedy:
                click.echo(f"       -> {finding.remedy}")
    click.echo("this user can mount" if not faults else f"faults: {faults}")
    return 1 if faults else 0
