"""warabifs under mount(8), umount(8) and fstab, by their real helpers in /sbin."""

from __future__ import annotations

import ctypes
import errno
import fcntl
import os
import re
import shutil
import signal
import socket
import stat
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import pytest

from tests.mount.support import (
    MIB,
    PROVIDER_ID,
    ROOT,
    Mount,
    another_python,
    environment,
    fails_with,
    is_mounted,
    line_of,
    mounting,
    processes_of,
    run,
    serving,
    wait_until,
    watchdog,
)
from warabi._core import mountinfo
from warabifs.mount import install, shutdown_socket, utab
from warabifs.mount import watchdog as watchdog_of_mount

BIN = Path(sys.executable).parent
WARABIFS = [sys.executable, "-c", "import sys; from warabifs.mount.cli import main; main()"]


pytestmark = pytest.mark.usefixtures("own_namespace", "helpers")


@pytest.fixture
def mountpoint(place: Path) -> Iterator[Path]:
    """An empty directory; what is mounted there in the end is unmounted, and its process ends."""
    path = place / "mnt"
    path.mkdir()
    try:
        yield path
    finally:
        while is_mounted(path):
            run("umount", "-i", "-l", path)
        wait_until(lambda: not processes_of(place), "the end of the mount's process")


def locked(target: Path) -> bool:
    """Whether some process has the target open."""
    with open(f"{target}.regions/LOCK") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return True
    return False


# Mounting


@pytest.mark.parametrize("kind", ["warabifs", "fuse.warabifs"])
def test_mount_and_umount_are_those_of_any_file_system(
    place: Path, mountpoint: Path, kind: str
) -> None:
    source = f"file:{place}/target"
    for content in (b"", b"first"):
        done = run("mount", "-t", kind, source, mountpoint, "-o", "noatime,nosuid,_netdev,noauto")
        assert (done.stdout, done.stderr) == ("", "")
        shown = run("findmnt", "-n", "-o", "FSTYPE,SOURCE,OPTIONS", mountpoint).stdout.split()
        assert shown[:2] == ["fuse.warabifs", source]
        assert {"rw", "noatime", "nosuid"} <= set(shown[2].split(","))
        run("mountpoint", mountpoint)
        assert run("df", "--output=source", mountpoint).stdout.split()[-1] == source
        file = mountpoint / "file"
        assert not content or file.read_bytes() == content
        (mountpoint / "big").write_bytes(b"x" * (32 * MIB))  # takes a while to be persisted
        file.write_bytes(b"first")
        done = run("umount", mountpoint)
        assert (done.stdout, done.stderr) == ("", "")
        assert not is_mounted(mountpoint)
        assert not locked(place / "target")  # everything is persisted when umount returns


def test_umount_by_the_name_of_the_source(place: Path, mountpoint: Path) -> None:
    run("mount", "-t", "warabifs", f"file:{place}/target", mountpoint)
    run("umount", f"file:{place}/target")
    assert not is_mounted(mountpoint)
    assert not locked(place / "target")


def test_mount_fuse3_finds_the_command_warabifs(place: Path, mountpoint: Path) -> None:
    env = {**environment(), "PATH": f"{BIN}:{os.environ['PATH']}"}
    for words in (
        ("mount.fuse3", "memory:", mountpoint, "-t", "fuse.warabifs", "-o", "rw,nosuid"),
        ("mount.fuse3", "warabifs#memory:", mountpoint, "-o", "ro"),
    ):
        subprocess.run([*map(str, words)], env=env, check=True, timeout=60)
        shown = run("findmnt", "-n", "-o", "FSTYPE,SOURCE", mountpoint).stdout.split()
        assert shown == ["fuse.warabifs", "memory:"]
        run("umount", mountpoint)


def test_mount_a_and_fstab(place: Path, mountpoint: Path) -> None:
    fstab = place / "fstab"
    other = place / "other"
    fstab.write_text(
        f"file:{place}/a {mountpoint} warabifs"
        " defaults,nofail,_netdev,user,noexec,uid=12,gid=34,umask=027,x-systemd.requires=x.service,"
        "x-systemd.mount-timeout=5s,comment=ours 0 0\n"
        f"memory: {other} fuse.warabifs noauto,ro 0 0\n"
    )
    other.mkdir()
    for _ in range(2):  # the second time it is mounted already
        run("mount", "-T", fstab, "-a")
    assert not is_mounted(other)
    lines = Path("/proc/self/mountinfo").read_text().splitlines()
    assert len([line for line in lines if f" {mountpoint} " in line]) == 1
    info = mountpoint.stat()
    assert (info.st_uid, info.st_gid, info.st_mode & 0o777) == (12, 34, 0o750)
    try:
        run("mount", "-T", fstab, other)
        with fails_with(errno.EROFS):
            (other / "file").write_bytes(b"data")
    finally:
        run("umount", other, check=False)
    run("umount", mountpoint)
    assert not locked(place / "a")


def test_mount_f_checks_and_mounts_nothing(place: Path, mountpoint: Path) -> None:
    run("mount", "-f", "-t", "warabifs", f"file:{place}/target", mountpoint)
    assert not is_mounted(mountpoint)
    assert not (place / "target").exists()
    done = run(
        "mount", "-f", "-t", "warabifs", "memory:", mountpoint, "-o", "nocraete", check=False
    )
    assert done.returncode == 1
    assert "did you mean nocreate?" in done.stderr


def test_all_the_flags_of_mount_at_once(place: Path, mountpoint: Path) -> None:
    """mount.TYPE SOURCE DIR [-sfnv] [-N NAMESPACE] [-o OPTIONS] [-t TYPE], as mount(8) has it."""
    helper = "/sbin/mount.warabifs"
    rest = ("-o", "rw,xyzzy", "-t", "warabifs")
    assert run(helper, "memory:", mountpoint, "-nv", *rest, check=False).returncode == 1
    run(helper, "memory:", mountpoint, "-sfnv", *rest)
    assert not is_mounted(mountpoint)
    run(helper, "memory:", mountpoint, "-snv", *rest)
    assert is_mounted(mountpoint)


def test_a_mount_in_another_namespace(place: Path, mountpoint: Path) -> None:
    script = "import sys; print('there', flush=True); input()"
    command = ["unshare", "-m", sys.executable, "-c", script]
    with subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as there:
        try:
            assert line_of(there) == "there"
            run("mount", "-N", str(there.pid), "-t", "warabifs", f"file:{place}/t", mountpoint)
            assert not is_mounted(mountpoint)
            assert str(mountpoint) in Path(f"/proc/{there.pid}/mountinfo").read_text()
            run("umount", "-N", str(there.pid), mountpoint)
            assert str(mountpoint) not in Path(f"/proc/{there.pid}/mountinfo").read_text()
            wait_until(lambda: not locked(place / "t"), "the target")
        finally:
            there.kill()


def test_modules_in_the_current_directory_are_not_imported(place: Path, mountpoint: Path) -> None:
    for name in ("trio", "warabifs", "argparse"):
        (place / f"{name}.py").write_text("raise SystemExit('imported from here')")
    run("mount", "-t", "warabifs", "memory:", mountpoint, cwd=place)
    run("umount", mountpoint, cwd=place)


def test_labels_are_refused_where_selinux_is_not_enabled(mountpoint: Path) -> None:
    assert not Path("/sys/fs/selinux/enforce").exists(), "a machine with SELinux"
    options = 'context="system_u:object_r:tmp_t:s0:c127,c456",rw'
    done = run("/sbin/mount.warabifs", "memory:", mountpoint, "-o", options, check=False)
    assert done.returncode == 1
    assert "context=system_u:object_r:tmp_t:s0:c127,c456: SELinux is not enabled" in done.stderr


# Remounting


def test_remounting_changes_the_kernels_options(place: Path, mountpoint: Path) -> None:
    run("mount", "-t", "warabifs", "memory:", mountpoint, "-o", "nosuid")
    file = mountpoint / "file"
    with open(file, "wb") as held:
        done = run("mount", "-o", "remount,ro", mountpoint, check=False)
        assert done.returncode
        assert "busy" in done.stderr
        held.write(b"still writable")
    done = run("mount", "-o", "remount,ro,noatime", mountpoint)
    assert (done.stdout, done.stderr) == ("", "")
    with fails_with(errno.EROFS):
        file.write_bytes(b"other")
    shown = set(run("findmnt", "-n", "-o", "OPTIONS", mountpoint).stdout.strip().split(","))
    assert {"ro", "nosuid", "noatime"} <= shown
    run("mount", "-o", "remount,rw", mountpoint)
    file.write_bytes(b"other")
    assert file.read_bytes() == b"other"


def test_remounting_tells_what_it_leaves_as_it_was(place: Path, mountpoint: Path) -> None:
    run("mount", "-t", "warabifs", "memory:", mountpoint)
    done = run("mount", "-o", "remount,ro,attr_timeout=5", mountpoint)
    assert "attr_timeout=5" in done.stderr
    with fails_with(errno.EROFS):
        (mountpoint / "file").write_bytes(b"data")


def test_only_a_warabifs_is_remounted(place: Path, mountpoint: Path) -> None:
    run("mount", "-t", "tmpfs", "none", mountpoint)
    done = run("/sbin/mount.warabifs", "none", mountpoint, "-o", "remount,ro", check=False)
    assert done.returncode == 1
    assert "no warabifs" in done.stderr
    (mountpoint / "file").write_bytes(b"data")


# Unmounting


HOLDER = """
import os, sys
fd = os.open(sys.argv[1], os.O_RDWR | os.O_CREAT)
print("open", flush=True)
input()
os.write(fd, b"late")
os.close(fd)
print("closed", flush=True)
input()
"""


def test_a_lazy_umount_does_not_wait_for_open_files_and_says_so(
    place: Path, mountpoint: Path
) -> None:
    source = f"file:{place}/target"
    run("mount", "-t", "warabifs", source, mountpoint)
    with another_python(HOLDER, mountpoint / "held") as holder:
        assert line_of(holder) == "open"
        busy = run("umount", mountpoint, check=False)
        assert busy.returncode
        assert "busy" in busy.stderr
        assert is_mounted(mountpoint)
        done = run("umount", "-l", mountpoint)
        assert "continues until the last file is closed" in done.stderr
        assert not is_mounted(mountpoint)
        assert holder.stdin is not None
        print("write", file=holder.stdin, flush=True)
        assert line_of(holder) == "closed"
    wait_until(lambda: not locked(place / "target"), "the target")
    run("mount", "-t", "warabifs", source, mountpoint)
    assert (mountpoint / "held").read_bytes() == b"late"
    done = run("umount", "-l", mountpoint)
    assert done.stderr == ""  # nothing was open: it waited


def test_umount_tells_what_is_not_persisted(place: Path) -> None:
    with serving("tcp") as provider:
        options = f"provider_id={PROVIDER_ID},reconnect=0"
        with mounting(provider.address, place, options) as mount:
            (mount.path / "file").write_bytes(b"data")
            provider.kill()
            done = run("umount", mount.path, check=False)
            assert done.returncode == 1
            assert "not everything is persisted" in done.stderr
            assert not is_mounted(mount.path)
            mount.wait()


def test_umount_tells_of_a_process_that_was_killed_meanwhile(place: Path) -> None:
    with mounting(f"file:{place}/target", place) as mount, watchdog(mount, 60):
        mount.signal(signal.SIGSTOP)
        command = [*WARABIFS, "umount", "--lazy", str(mount.path)]
        with subprocess.Popen(command, stderr=subprocess.PIPE, text=True) as umount:
            wait_until(lambda: not is_mounted(mount.path), "the kernel")
            mount.kill()
            assert umount.stderr is not None
            assert "exited without a report" in umount.stderr.read()
            assert umount.wait(60) == 1


def test_umount_waits_for_a_slow_disk_with_a_time_limit(place: Path) -> None:
    with serving("tcp") as provider:
        options = f"provider_id={PROVIDER_ID}"
        with mounting(provider.address, place, options) as mount, watchdog(mount, 60):
            provider.process.send_signal(signal.SIGSTOP)
            command = [*WARABIFS, "umount", "--timeout", "0.3"]
            done = run(*command, mount.path, check=False)
            assert done.returncode == 1
            assert f"process {mount.pid} is still persisting" in done.stderr
            assert not is_mounted(mount.path)
            provider.process.send_signal(signal.SIGCONT)
            assert mount.wait() == 0


def test_only_a_warabifs_is_unmounted(place: Path, mountpoint: Path) -> None:
    run("mount", "-t", "tmpfs", "none", mountpoint)
    for command in ([*WARABIFS, "umount"], ["/sbin/umount.fuse.warabifs"]):
        done = run(*command, mountpoint, check=False)
        assert done.returncode == 1
        assert "no warabifs is mounted there" in done.stderr
    assert is_mounted(mountpoint)


class FileSystem(NamedTuple):
    """What is mounted somewhere."""

    device: str
    number: int

    @property
    def gone(self) -> bool:
        return mountinfo.is_gone(self.device, self.number)


def file_system_of(path: Path) -> FileSystem:
    device = mountinfo.device_number(str(path))
    number = mountinfo.identity(device)
    assert number
    return FileSystem(device, number)


def socket_of(path: Path) -> Path:
    """The socket by which umount asks the process of the mount on *path*."""
    device, number = file_system_of(path)
    (found,) = Path("/run/warabi").glob(f"umount.{device}.{number}.*")
    return found


def test_a_bind_mount_is_unmounted_at_once(place: Path, mountpoint: Path) -> None:
    source = f"file:{place}/target"
    run("mount", "-t", "warabifs", source, mountpoint)
    other = place / "other"
    other.mkdir()
    run("mount", "--bind", mountpoint, other)
    try:
        (other / "file").write_bytes(b"data")
        # The first one, and then the other one, is the one that is left.
        for path in (other, mountpoint):
            done = run("umount", path, timeout=20)
            assert (done.stdout, done.stderr) == ("", "")
            assert not is_mounted(path)
            assert locked(place / "target") == (path == other)
            if path == other:
                assert (mountpoint / "file").read_bytes() == b"data"
    finally:
        run("umount", "-l", other, check=False)


def test_a_mount_that_another_namespace_has_too_is_unmounted_at_once(
    place: Path, mountpoint: Path
) -> None:
    run("mount", "-t", "warabifs", f"file:{place}/target", mountpoint)
    script = "import sys; print('there', flush=True); input()"
    command = ["unshare", "-m", "--propagation=private", sys.executable, "-c", script]
    with subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as there:
        try:
            assert line_of(there) == "there"
            done = run("umount", mountpoint, timeout=20)
            assert (done.stdout, done.stderr) == ("", "")
            assert not is_mounted(mountpoint)
            assert locked(place / "target")
            run("umount", "-N", str(there.pid), mountpoint, timeout=20)
            wait_until(lambda: not locked(place / "target"), "the target")
        finally:
            there.kill()


def test_sigterm_ends_a_mount_that_is_mounted_twice(place: Path) -> None:
    with mounting(f"file:{place}/target", place) as mount, watchdog(mount, 60):
        other = place / "other"
        other.mkdir()
        run("mount", "--bind", mount.path, other)
        try:
            (other / "file").write_bytes(b"data")
            mount.signal(signal.SIGTERM)
            mount.wait()
            with fails_with(errno.ENOTCONN):
                (other / "file").read_bytes()
        finally:
            run("umount", "-l", other, check=False)
        mount.start()
        assert (mount.path / "file").read_bytes() == b"data"


def test_umount_fails_if_the_mount_cannot_be_asked(place: Path, mountpoint: Path) -> None:
    run("mount", "-t", "warabifs", f"file:{place}/target", mountpoint)
    path = socket_of(mountpoint)
    path.rename(place / "hidden")
    done = run("umount", mountpoint, check=False)
    assert done.returncode == 1
    assert "not known whether everything is persisted" in done.stderr
    assert not is_mounted(mountpoint)


def test_abandoned_connections_do_not_fill_the_queue(place: Path, mountpoint: Path) -> None:
    """Such as those of a ``umount`` that was refused, and of each mount that starts."""
    run("mount", "-t", "warabifs", f"file:{place}/target", mountpoint)
    path = socket_of(mountpoint)
    for _ in range(2 * shutdown_socket._QUEUE):
        with socket.socket(socket.AF_UNIX) as client:
            client.connect(str(path))
    assert len(os.listdir(f"/proc/{path.name.rpartition('.')[2]}/fd")) < 100
    done = run("umount", mountpoint)
    assert done.stderr == ""
    assert not locked(place / "target")


def entries_of(path: Path) -> int:
    return Path("/run/mount/utab").read_text().count(f" TARGET={path} ")


HOLDS = "import sys; print('there', flush=True); input()"


def test_entries_of_mounts_that_were_killed_are_removed_later(place: Path) -> None:
    """Also while a mount lives that is not seen from here, but not that one's."""
    (place / "other").mkdir()
    with (
        mounting("memory:", place / "other") as other,
        another_python(HOLDS, prefix=("unshare", "-m", "--propagation=private")) as there,
    ):
        assert line_of(there) == "there"
        assert ctypes.CDLL(None).umount2(os.fsencode(other.path), 2) == 0  # umount(8) removes it
        with mounting("memory:", place) as mount:
            file_system = file_system_of(mount.path)
            mount.kill()
            utab.remove_stale()
            assert entries_of(mount.path) == 1  # so umount(8) tells that it was killed
            run("fusermount3", "-u", "-z", mount.path)
            wait_until(lambda: file_system.gone, "the kernel")
            assert entries_of(mount.path) == 1
            utab.remove_stale()
            assert entries_of(mount.path) == 0
            assert entries_of(other.path) == 1
        other.kill()
        there.kill()
        there.wait()

        def removed() -> bool:
            utab.remove_stale()
            return not entries_of(other.path)

        wait_until(removed, "the removal of an entry")


def test_an_entry_stays_while_the_mount_point_has_another_one(place: Path) -> None:
    """Entries are removed by their mount points, the newest one first."""
    with mounting("memory:", place) as mount:
        # Else another process could take the next entry for a stale one that is alone.
        wait_until(lambda: entries_of(mount.path) == 1, "the mount's own entry")
        utab._update(b"memory:", os.fsencode(mount.path), b"warabifs=0:1/1")  # of none that is left
        utab._update(b"memory:", os.fsencode(mount.path), b"")  # as mount(8) makes one
        utab.remove_stale()
        assert entries_of(mount.path) == 3
        file_system = file_system_of(mount.path)
        run("umount", mount.path)  # removes the newest one, and the mount its own
        mount.wait()
        wait_until(lambda: file_system.gone, "the kernel")
        utab.remove_stale()
        assert entries_of(mount.path) == 0


def test_a_killed_mount_has_persisted_nothing_that_is_known(place: Path) -> None:
    with mounting("memory:", place) as mount:
        path, file_system = socket_of(mount.path), file_system_of(mount.path)
        mount.kill()
        (place / "other").mkdir()
        with mounting("memory:", place / "other"):  # which tells what was killed and is unmounted
            done = run("umount", mount.path, check=False)
        assert done.returncode == 1
        assert "exited without a report" in done.stderr
        assert not is_mounted(mount.path)
        assert path.exists()
        wait_until(lambda: file_system.gone, "the kernel")
        mount.start()  # removes what is left of processes that were killed
        assert not path.exists()
        assert str(mount.pid) in socket_of(mount.path).name


def test_a_killed_mount_that_is_mounted_twice_says_so_at_once(place: Path) -> None:
    """As well in another namespace: no later unmounting would tell more."""
    (place / "other").mkdir()
    with mounting("memory:", place) as mount:
        run("mount", "--bind", mount.path, place / "other")
        try:
            mount.kill()
            done = run("umount", mount.path, check=False)
            assert done.returncode == 1
            assert "exited without a report" in done.stderr
        finally:
            run("umount", "-i", "-l", place / "other")


def test_a_mount_with_the_device_number_of_a_killed_one_does_not_answer_for_it(
    place: Path,
) -> None:
    """The kernel uses numbers again while the processes of earlier mounts may still be there."""
    (place / "other").mkdir()
    with (
        mounting("memory:", place) as mount,
        mounting("memory:", place / "other") as earlier,
    ):
        mine, theirs = file_system_of(mount.path), file_system_of(earlier.path)
        path = socket_of(earlier.path)
        alias = path.with_name(f"umount.{mine.device}.{theirs.number}.{earlier.pid}")
        path.rename(alias)  # as if the number had been used again
        try:
            mount.kill()
            done = run("umount", mount.path, check=False)
        finally:
            alias.rename(path)
        assert done.returncode == 1
        assert "exited without a report" in done.stderr


def test_the_watchdog_aborts_no_other_mount_with_the_same_device_number(place: Path) -> None:
    with mounting("memory:", place) as mount:
        device, number = file_system_of(mount.path)
        busy = os.open(mount.path, os.O_RDONLY)
        try:
            watchdog_of_mount._abort(device, number + 1)
            (mount.path / "file").write_bytes(b"data")
            watchdog_of_mount._abort(device, number)
            with fails_with(errno.ENOTCONN, errno.ECONNABORTED):
                (mount.path / "other").write_bytes(b"data")
        finally:
            os.close(busy)


IMPOSTOR = """
import os, socket, sys
device, place = sys.argv[1:]
os.setuid(65534)
left = []
for name in ("\\0warabifs/" + device, "/tmp/warabi-0/umount." + device + ".1"):
    with socket.socket(socket.AF_UNIX) as listener:
        try:
            os.makedirs(os.path.dirname(name), 0o700) if name[0] == "/" else None
            listener.bind(name)
            listener.listen()
            left.append(listener.detach())
        except OSError:
            pass
try:
    os.listdir("/run/warabi")
    raise SystemExit("names can be seen")
except PermissionError:
    pass
for count in range(5000):  # more than any queue holds
    client = socket.socket(socket.AF_UNIX)
    try:
        client.connect(place)
        raise SystemExit("another user is let in")
    except PermissionError:
        client.close()
print("ready", flush=True)
input()
"""


def test_another_user_cannot_answer_for_a_mount(place: Path, mountpoint: Path) -> None:
    """Neither by taking the names of sockets, nor by filling their queues."""
    with serving("tcp") as provider:
        options = f"provider_id={PROVIDER_ID},reconnect=0"
        run("mount", "-t", "warabifs", provider.address, mountpoint, "-o", options)
        path = socket_of(mountpoint)
        device = file_system_of(mountpoint).device
        with another_python(IMPOSTOR, device, path) as impostor:
            try:
                assert line_of(impostor) == "ready"
                (mountpoint / "file").write_bytes(b"data")
                provider.kill()
                done = run("umount", mountpoint, check=False)
                assert done.returncode == 1
                assert "not everything is persisted" in done.stderr
            finally:
                owner = Path("/tmp/warabi-0")
                if owner.exists() and owner.stat().st_uid == 65534:
                    shutil.rmtree(owner)


# Set-ID programs and devices


def shown_options(path: Path) -> set[str]:
    return set(run("findmnt", "-n", "-o", "OPTIONS", path).stdout.strip().split(","))


def test_roots_mounts_are_suid_and_dev_as_those_of_any_file_system(
    place: Path, mountpoint: Path
) -> None:
    run("mount", "-t", "warabifs", f"file:{place}/target", mountpoint, "-o", "suid,dev")
    assert not {"nosuid", "nodev"} & shown_options(mountpoint)
    program, device = mountpoint / "id", mountpoint / "null"
    shutil.copy(shutil.which("id") or "/usr/bin/id", program)
    os.chown(program, 4711, 4712)
    program.chmod(0o6755)
    os.mknod(device, 0o666 | stat.S_IFCHR, os.makedev(1, 3))
    command = ["setpriv", "--reuid=65534", "--regid=65534", "--clear-groups"]
    assert run(*command, program, "-u").stdout.strip() == "4711"
    assert run(*command, program, "-g").stdout.strip() == "4712"
    device.write_bytes(b"swallowed")
    assert device.read_bytes() == b""
    run("umount", mountpoint)
    run("mount", "-t", "warabifs", f"file:{place}/target", mountpoint, "-o", "nosuid,nodev")
    assert {"nosuid", "nodev"} <= shown_options(mountpoint)
    assert run(*command, program, "-u").stdout.strip() == "65534"
    with fails_with(errno.EACCES):
        device.read_bytes()


@pytest.mark.parametrize(
    ("options", "absent"),
    [
        ("defaults", set()),
        ("rw,nosuid", {"nosuid"}),
        ("nodev", {"nodev"}),
        ("user", {"nosuid", "nodev", "noexec"}),
        ("uid=0", {"nosuid", "nodev"}),  # the owners shown are not those who set the bits
        ("umask=0", {"nosuid", "nodev"}),
    ],
)
def test_fstab_says_whether_set_id_bits_and_devices_count(
    place: Path, mountpoint: Path, options: str, absent: set[str]
) -> None:
    fstab = place / "fstab"
    fstab.write_text(f"memory: {mountpoint} warabifs {options} 0 0\n")
    run("mount", "-T", fstab, "-a")
    assert {"nosuid", "nodev", "noexec"} & shown_options(mountpoint) == absent


def test_remounting_keeps_what_set_id_bits_and_devices_count(mountpoint: Path) -> None:
    for options in ("suid,dev", "nosuid", "nodev"):
        run("mount", "-t", "warabifs", "memory:", mountpoint, "-o", options)
        before = {"nosuid", "nodev"} & shown_options(mountpoint)
        assert before == {"nosuid", "nodev"} & {options}
        run("mount", "-o", "remount,ro", mountpoint)
        assert {"nosuid", "nodev"} & shown_options(mountpoint) == before
        run("umount", mountpoint)


# Dead mounts


def test_dead_mounts_in_and_on_each_other_are_removed(place: Path) -> None:
    (place / "other").mkdir()
    with (
        mounting("memory:", place) as lower,
        mounting("memory:", place / "other") as upper,
    ):
        inner = lower.path / "inner"
        inner.mkdir()
        nested = Mount("memory:", inner, place / "nested.log")
        try:
            nested.start()
            run("mount", "--make-private", "/", check=False)
            run("mount", "--move", upper.path, lower.path)
            for mount in (nested, lower, upper):
                mount.kill()
            lines = Path("/proc/self/mountinfo").read_text().splitlines()
            assert len([line for line in lines if f" {lower.path}" in line]) == 3
            fresh = Mount("memory:", lower.path, place / "fresh.log")
            try:
                fresh.start()
                assert os.listdir(fresh.path) == []
                lines = Path("/proc/self/mountinfo").read_text().splitlines()
                assert len([line for line in lines if f" {lower.path}" in line]) == 1
            finally:
                fresh.close()
        finally:
            nested.close()


# Installing


def test_installing_twice_changes_nothing_and_uninstalling_leaves_nothing(tmp_path: Path) -> None:
    command = [*WARABIFS, "install-helper", "--prefix", str(tmp_path)]
    assert run(*command).stdout.count("installed") == 5
    files = sorted(path for path in tmp_path.rglob("*") if path.is_file())
    assert [str(path.relative_to(tmp_path)) for path in files] == [
        "sbin/mount.fuse.warabifs",
        "sbin/mount.warabifs",
        "sbin/umount.fuse.warabifs",
        "sbin/umount.warabifs",
        "share/man/man8/mount.warabifs.8",
    ]
    assert all(os.access(path, os.X_OK) == (path.parent.name == "sbin") for path in files[:4])
    assert run(*command).stdout == ""
    (tmp_path / "sbin/mount.warabifs").write_text(f"# {install.MARK}\nan older version")
    assert run(*command).stdout == f"{tmp_path}/sbin/mount.warabifs: installed\n"
    assert run(*command, "--uninstall").stdout.count("removed") == 5
    assert [path for path in tmp_path.rglob("*") if path.is_file()] == []
    assert run(*command, "--uninstall").stdout == ""


def test_what_is_not_ours_is_left_alone(tmp_path: Path) -> None:
    theirs = tmp_path / "sbin/umount.warabifs"
    theirs.parent.mkdir()
    theirs.write_text("#!/bin/sh\nprecious\n")
    for more in ("", "--uninstall"):
        command = [*WARABIFS, "install-helper", "--prefix", str(tmp_path), *more.split()]
        done = run(*command, check=False)
        assert done.returncode == 1
        assert done.stderr.count("\n") == 1
        assert str(theirs) in done.stderr
        assert [path for path in tmp_path.rglob("*") if path.is_file()] == [theirs]
    assert theirs.read_text() == "#!/bin/sh\nprecious\n"


def test_the_manual_is_that_of_the_options_and_renders_without_warnings() -> None:
    shown = run(
        "env", "MANWIDTH=500", "man", "--warnings", "-E", "UTF-8", "-l",
        "/usr/local/share/man/man8/mount.warabifs.8",
    )  # fmt: skip
    assert shown.stderr == ""
    from warabifs.mount.options import KERNEL, rows

    text = shown.stdout.replace("‐", "-")
    for name, explanation in [*rows(), *KERNEL.items()]:
        assert name in text
        assert explanation in text
    found = run("man", "-w", "mount.warabifs").stdout.strip()
    assert os.path.samefile(found, "/usr/local/share/man/man8/mount.warabifs.8")


def test_the_commands_of_the_page(place: Path) -> None:
    """Those of docs/mount.md, in directories of the test's own."""
    page = (ROOT / "docs" / "mount.md").read_text()
    by_hand, by_mount, fstab = re.findall(r"^```\n(.*?)^```$", page, re.DOTALL | re.MULTILINE)
    for name in ("srv", "mnt"):
        (place / name).mkdir()
        run("mount", "--bind", place / name, f"/{name}")
    (place / "mnt" / "a").mkdir()
    (place / "fstab").write_text(fstab)
    by_fstab = f"mount -T {place}/fstab /mnt/a; findmnt -n -o FSTYPE /mnt/a; umount /mnt/a"
    script = "\n".join(("set -euo pipefail", f"PATH={BIN}:$PATH", by_hand, by_mount, by_fstab))
    try:
        done = run("bash", "-c", script)
    finally:
        while is_mounted(Path("/mnt/a")):
            run("umount", "-i", "-l", "/mnt/a")
        wait_until(lambda: not processes_of(Path("/srv/target")), "the end of the mounts")
    assert (done.stdout, done.stderr) == ("fuse.warabifs\n", "")
    assert (place / "srv" / "target").is_file()
