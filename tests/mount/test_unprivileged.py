"""Mounts by another user than root, with fusermount3 and in a namespace of the user's own."""

from __future__ import annotations

import contextlib
import itertools
import os
import pwd
import shlex
import stat
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.mount.support import ROOT, is_mounted, mounting, processes_of, run, wait_until

USER = pwd.getpwnam("nobody").pw_uid
OTHER = pwd.getpwnam("games").pw_uid
MOUNT = "warabifs.mount.main"
WARABIFS = "import sys; from warabifs.mount.cli import main; main()"
pytestmark = pytest.mark.usefixtures("machine")


class User:
    """Runs commands as a user who is not root, with no privilege but to read everything: this
    Python may be in root's home."""

    def __init__(self, uid: int = USER) -> None:
        may_read = ("--inh-caps=+dac_read_search", "--ambient-caps=+dac_read_search")
        # Root's runtime directory, which the tests have, is not the user's.
        ids = (f"--reuid={uid}", f"--regid={uid}", "--clear-groups")
        environ = ("env", "-u", "WARABI_RUNTIME_DIR")
        self._become = (*environ, "setpriv", *ids, *may_read)

    def run(self, *command: str | Path, check: bool = True) -> subprocess.CompletedProcess[str]:
        return run(*self._become, *command, check=check)

    def python(self, *arguments: str | Path, check: bool = True) -> str:
        return self.run(sys.executable, *arguments, check=check).stdout


@contextlib.contextmanager
def device_mode(mode: int) -> Iterator[None]:
    """/dev/fuse with this mode, as udev makes it 0666, while the block runs."""
    before = stat.S_IMODE(os.stat("/dev/fuse").st_mode)
    os.chmod("/dev/fuse", mode)
    try:
        yield
    finally:
        os.chmod("/dev/fuse", before)


@pytest.fixture
def user(machine: None) -> Iterator[User]:
    with device_mode(0o666):
        yield User()


@pytest.fixture
def mountpoint(place: Path) -> Iterator[Path]:
    """A directory of the user's; what is mounted there in the end goes."""
    os.chown(place, USER, USER)
    path = place / "mnt"
    path.mkdir()
    os.chown(path, USER, USER)
    try:
        yield path
    finally:
        while is_mounted(path):
            run("umount", "-i", "-l", path)
        wait_until(lambda: not processes_of(place), "the end of the mount's process")


def mount(user: User, source: str, path: Path, *more: str) -> None:
    user.python("-m", MOUNT, source, path, "-o", f"log={path.parent}/log", *more)


def test_a_user_mounts_uses_and_unmounts(user: User, place: Path, mountpoint: Path) -> None:
    source = f"file:{place}/target"
    script = "import sys; open(sys.argv[1], 'ab').write(b'data'); print(open(sys.argv[1]).read())"
    for wanted in ("data", "datadata"):
        mount(user, source, mountpoint)
        options = run("findmnt", "-n", "-o", "OPTIONS", mountpoint).stdout.strip().split(",")
        assert {f"user_id={USER}", "nosuid", "nodev", "default_permissions"} <= set(options)
        assert "allow_other" not in options
        assert user.python("-c", script, mountpoint / "file").strip() == wanted
        with pytest.raises(PermissionError):
            os.listdir(mountpoint)  # not even root gets in
        user.python("-c", WARABIFS, "umount", mountpoint)
        assert not is_mounted(mountpoint)
        assert (place / "target").stat().st_uid == USER
    mount(user, source, mountpoint)
    user.run("umount", mountpoint)  # without helper, by the rule for FUSE of umount(8)
    assert not is_mounted(mountpoint)


def test_another_user_cannot_unmount_it(user: User, place: Path, mountpoint: Path) -> None:
    mount(user, "memory:", mountpoint)
    for command in (
        ("fusermount3", "-u", mountpoint),
        (sys.executable, "-c", WARABIFS, "umount", mountpoint),
    ):
        assert User(OTHER).run(*command, check=False).returncode
    assert is_mounted(mountpoint)
    user.run("fusermount3", "-u", mountpoint)


def test_a_dead_mount_of_the_user_is_removed_by_the_next(
    user: User, place: Path, mountpoint: Path
) -> None:
    mount(user, "memory:", mountpoint)
    for pid in processes_of(mountpoint):
        os.kill(pid, 9)
    wait_until(lambda: not processes_of(mountpoint), "the end of the process")
    assert is_mounted(mountpoint)
    mount(user, "memory:", mountpoint)
    assert user.python("-c", "import os, sys; print(os.listdir(sys.argv[1]))", mountpoint) == "[]\n"


def test_allow_other_needs_user_allow_other_in_fuse_conf(
    user: User, place: Path, mountpoint: Path
) -> None:
    configuration = Path("/etc/fuse.conf")
    before = configuration.read_text()
    assert "\nuser_allow_other" not in before, "a machine where users may allow others"
    words = ["-m", MOUNT, "memory:", str(mountpoint), "-o", "allow_other"]
    done = user.run(sys.executable, *words, check=False)
    assert done.returncode == 1
    assert done.stderr.count("\n") == 1
    assert "user_allow_other" in done.stderr
    try:
        configuration.write_text(before + "\nuser_allow_other\n")
        user.python(*words)
        assert os.listdir(mountpoint) == []
    finally:
        configuration.write_text(before)


def test_dev_fuse_for_root_only_is_reported(place: Path, mountpoint: Path) -> None:
    with device_mode(0o600):
        done = User().run(sys.executable, "-m", MOUNT, "memory:", mountpoint, check=False)
        assert done.returncode == 1
        assert done.stderr.startswith("mount.warabifs: /dev/fuse")
        assert "0666" in done.stderr


def opened(scratch: Path) -> str:
    """Shell commands that let everybody reach this Python, in a mount namespace of its own."""
    needed = {Path(sys.base_prefix), Path(sys.prefix), ROOT}
    closed = {
        path: above
        for path in needed
        for above in (*path.parents, path)
        if not above.stat().st_mode & stat.S_IXOTH
    }
    lines = ["set -e"]
    for number, path in enumerate(closed):
        lines += [f"mkdir {scratch}/{number}", f"mount --bind {path} {scratch}/{number}"]
    lines += [f"mount -t tmpfs -o mode=755 none {above}" for above in set(closed.values())]
    for number, path in enumerate(closed):
        lines += [f"mkdir -p {path}", f"mount --move {scratch}/{number} {path}"]
    return "\n".join(lines)


@pytest.mark.usefixtures("helpers")
def test_an_fstab_line_with_user_lets_any_user_mount(
    user: User, place: Path, mountpoint: Path, tmp_path: Path, front_end: str
) -> None:
    """mount(8) is set-uid root and gives that up before it calls the helper."""
    fstab = place / "fstab"
    options = f"noauto,user,frontend={front_end}"
    fstab.write_text(f"file:{place}/target {mountpoint} warabifs {options} 0 0\n")
    as_user = f"setpriv --reuid={USER} --regid={USER} --clear-groups"
    script = f"""
{opened(tmp_path)}
cd /
{as_user} mount -T {fstab} {mountpoint}
findmnt -n -o OPTIONS {mountpoint}
{as_user} sh -c 'echo data > {mountpoint}/file'
{as_user} umount {mountpoint}
{as_user} mount -T {fstab} {mountpoint}
{as_user} cat {mountpoint}/file
{as_user} umount {mountpoint}
mount -t warabifs file:{place}/target {mountpoint} -o frontend={front_end}
cat {mountpoint}/file
umount {mountpoint}
"""
    done = run("unshare", "-m", "sh", "-c", script)
    assert done.stderr == ""
    shown, *data = done.stdout.splitlines()
    assert {f"user_id={USER}", "noexec", "nosuid", "nodev"} <= set(shown.split(","))
    assert data == ["data", "data"]


def test_a_mount_in_a_user_namespace_needs_no_set_uid_helper(place: Path) -> None:
    """As ``unshare -Urm`` or a rootless container has it: fusermount3 is not there.

    Root makes the namespace, whose files this Python may be; in it, it may do no more than others.
    """
    path = place / "mnt"
    path.mkdir()
    script = """
set -e
mount -t tmpfs none /mnt
$1 -m warabifs.mount.main file:$2/target $2/mnt
findmnt -n -o FSTYPE $2/mnt
echo data > $2/mnt/file
stat -c '%u %g' $2/mnt/file
umount $2/mnt
$1 -m warabifs.mount.main file:$2/target $2/mnt -o ro
cat $2/mnt/file
umount $2/mnt
"""
    with device_mode(0o666):
        done = run(
            "env", "PATH=/bin:/usr/bin", "unshare", "-Urm", "sh", "-c", script, "sh",
            sys.executable, place,
        )  # fmt: skip
    assert done.stderr == ""
    assert done.stdout == "fuse.warabifs\n0 0\ndata\n"
    assert not is_mounted(path)
    wait_until(lambda: not processes_of(place), "the end of the mount's process")


# Advice


def advice(
    *arguments: str, user: User | None = None, place: Path | None = None
) -> tuple[int, dict[str, str]]:
    """Whether ``warabifs doctor`` finds a fault, and what it finds wrong: text and remedy.

    Mounts that are not in *place* may be anything.
    """
    words = (*arguments, sys.executable, "-c", WARABIFS, "doctor")
    done = user.run(*words, check=False) if user else run(*words, check=False)
    assert done.stderr == ""
    lines = done.stdout.splitlines()
    assert done.returncode == any(line.startswith("fault:") for line in lines)
    found = {
        line: after.removeprefix("       -> ")
        for line, after in itertools.pairwise(lines)
        if line.startswith(("fault:", "hint:"))
        and (f" {place}/" in line or not line.endswith(("not answer", "has died")))
    }
    return any(line.startswith("fault:") for line in found), found


def remedy(found: dict[str, str], *words: str) -> str:
    """The remedy of the finding that has these words."""
    return next(cure for text, cure in found.items() if all(word in text for word in words))


def test_the_doctor_finds_nothing_to_keep_root_from_mounting() -> None:
    status, found = advice()
    assert status == 0
    assert not [line for line in found if line.startswith("fault")]


def test_the_doctors_remedy_for_the_device_mends_it(user: User) -> None:
    status, found = advice(user=user)
    assert status == 0, found
    os.chmod("/dev/fuse", 0o600)  # the fixture puts it right
    status, found = advice(user=user)
    assert status == 1
    cure = remedy(found, "fault:", "/dev/fuse has mode 0600")
    assert remedy(advice()[1], "hint:", "/dev/fuse has mode 0600") == cure
    run(*shlex.split(cure))
    assert advice(user=user)[0] == 0


def test_the_doctor_tells_what_a_container_lacks(user: User) -> None:
    script = 'mount -t tmpfs none /dev && exec "$0" "$@"'
    status, found = advice("unshare", "-m", "sh", "-c", script)
    assert status == 1
    assert "--device /dev/fuse" in remedy(found, "/dev/fuse does not exist")
    without = ("setpriv", "--bounding-set=-sys_admin", "--inh-caps=-sys_admin")
    status, found = advice(*without)
    assert status == 1
    assert "--cap-add SYS_ADMIN" in remedy(found, "lacks CAP_SYS_ADMIN")
    status, found = advice("setpriv", "--no-new-privs", user=user)
    assert status == 1
    assert "unshare -Urm" in remedy(found, "no_new_privs")


def test_the_doctors_remedy_for_the_runtime_directory_mends_it(place: Path) -> None:
    directory = place / "runtime"
    directory.mkdir(mode=0o755)
    variable = ("env", f"WARABI_RUNTIME_DIR={directory}")
    status, found = advice(*variable)
    assert status == 1
    run(*shlex.split(remedy(found, str(directory), "used by others")))
    assert advice(*variable)[0] == 0


def test_the_doctors_remedy_for_a_dead_mount_mends_it(place: Path) -> None:
    with mounting("memory:", place) as dead:
        assert advice(place=place)[0] == 0
        dead.kill()
        status, found = advice(place=place)
        assert status == 1
        cure = remedy(found, f"{dead.path}: the process of memory: has died")
        run(*shlex.split(cure.rpartition(": ")[2]))
        assert not is_mounted(dead.path)
        assert advice(place=place)[0] == 0


@pytest.mark.usefixtures("helpers")
def test_the_doctor_looks_at_the_helper() -> None:
    assert not [line for line in advice()[1] if "/sbin/mount.warabifs" in line]
    helper = Path("/sbin/mount.warabifs")
    before = helper.read_text()
    helper.write_text(before.replace(sys.executable, "/nowhere/python"))
    try:
        status, found = advice()
        assert status == 1
        assert remedy(found, "/nowhere/python", "cannot run").endswith("warabifs install-helper")
    finally:
        helper.write_text(before)
