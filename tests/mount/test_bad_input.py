"""Invalid arguments of mount.warabifs: one line on standard error, and nothing is left behind."""

from __future__ import annotations

import contextlib
import errno
import os
import shlex
import socket
import sqlite3
import sys
import threading
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path

import pytest

from tests.mount.support import (
    PATIENCE,
    PROVIDER_ID,
    Mount,
    fails_with,
    is_mounted,
    mounting,
    processes_of,
    run,
    serving,
    wait_until,
)

MOUNT = [sys.executable, "-W", "error", "-m", "warabifs.mount.main"]


@pytest.fixture
def mountpoint(place: Path) -> Path:
    path = place / "mnt"
    path.mkdir()
    return path


def refused(*arguments: str | Path, command: list[str] | None = None) -> str:
    """The one line with which ``mount.warabifs`` refuses *arguments*."""
    done = run(*(command or MOUNT), *arguments, check=False)
    assert done.returncode == 1, done
    assert done.stdout == ""
    assert done.stderr.startswith("mount.warabifs: "), done.stderr
    assert done.stderr.count("\n") == 1, done.stderr
    return done.stderr


# Mount points


def test_a_missing_mount_point(place: Path) -> None:
    assert str(place / "missing") in refused("memory:", place / "missing")


def test_a_file_as_mount_point(place: Path) -> None:
    (place / "file").write_bytes(b"data")
    assert "not a directory" in refused("memory:", place / "file")
    assert (place / "file").read_bytes() == b"data"


def test_a_mount_point_that_is_in_use(place: Path) -> None:
    with mounting("memory:", place) as mount:
        (mount.path / "file").write_bytes(b"data")
        assert "already a mount point" in refused("memory:", mount.path)
        assert (mount.path / "file").read_bytes() == b"data"
        lines = Path("/proc/self/mountinfo").read_text().splitlines()
        assert len([line for line in lines if f" {mount.path} " in line]) == 1


def test_a_mount_point_where_something_else_is_mounted(mountpoint: Path) -> None:
    run("mount", "-t", "tmpfs", "none", mountpoint)
    try:
        assert "already a mount point" in refused("memory:", mountpoint)
    finally:
        run("umount", mountpoint)


def test_a_refusal_creates_no_target(place: Path) -> None:
    refused(f"file:{place}/target", place / "missing")
    assert os.listdir(place) == []


# Options and sources


@pytest.mark.parametrize(
    ("option", "hint"),
    [
        ("nocraete", "did you mean nocreate?"),
        ("provider-id=3", "did you mean provider_id?"),
        ("diret_io", "did you mean direct_io?"),
        ("xyzzy", "unknown option xyzzy"),
        ("provider_id=x", "0 to 65535"),
        ("provider_id=65536", "0 to 65535"),
        ("provider_id=-1", "0 to 65535"),
        ("provider_id", "provider_id=N"),
        ("provider_id=²", "0 to 65535"),
        (f"provider_id={'9' * 5000}", "0 to 65535"),
        ("timeout=soon", "expected a number"),
        ("timeout=nan", "expected a number"),
        ("attr_timeout=-1", "expected a number"),
        ("entry_timeout=1e99", "expected a number"),
        ("nocreate=1", "expected nocreate"),
        ("passthrough,exclusive", "at most one of them"),
        ("passthrough,direct_io", "at most one of them"),
        ("passthrough,sync", "sync data but not metadata"),
        ("passthrough,suid", "would not clear set-id bits"),
        ("log=/missing/directory/log", "/missing/directory/log"),
    ],
)
def test_a_bad_option(mountpoint: Path, option: str, hint: str) -> None:
    assert hint in refused("memory:", mountpoint, "-o", f"rw,{option}")
    assert not is_mounted(mountpoint)


def test_a_refusal_in_the_foreground_is_the_same_line(place: Path, mountpoint: Path) -> None:
    (place / "directory").mkdir()
    for source, option in (("memory:", "xyzzy"), (f"file:{place}/directory", "rw")):
        arguments = (source, mountpoint, "-o", option)
        assert refused(*arguments, "-f") == refused(*arguments)


@pytest.mark.parametrize(
    "source",
    [
        "", ":", "memory", "memory:x", "file", "file:", "floppy:disk", "/a/path",
        "na+sm:", "na+sm://", "na+sm://nonsense", "ofi+tcp://", "ofi+tcp://localhost",
        "ofi+tcp://localhost:", "ofi+tcp://localhost:x", "ofi+tcp://localhost:65536",
        "ofi+tcp://:80", "http://localhost:80", "ofi+tcp://local\nhost:80", "file:a\nb/c",
    ],
)  # fmt: skip
def test_a_bad_source(mountpoint: Path, source: str) -> None:
    refused(source, mountpoint)
    assert not is_mounted(mountpoint)


def test_bad_arguments_get_the_usage() -> None:
    for arguments in ([], ["memory:"], ["memory:", "/tmp", "more"], ["--unknown"]):
        done = run(*MOUNT, *arguments, check=False)
        assert done.returncode == 2
        assert done.stderr.startswith("usage: mount.warabifs SOURCE MOUNTPOINT")
        assert "Traceback" not in done.stderr


# Targets


def test_a_target_in_a_directory_that_does_not_exist(place: Path, mountpoint: Path) -> None:
    message = refused(f"file:{place}/missing/target", mountpoint)
    assert f"{place}/missing" in message
    assert not (place / "missing").exists()


def test_a_missing_target_with_nocreate(place: Path, mountpoint: Path) -> None:
    message = refused(f"file:{place}/target", mountpoint, "-o", "nocreate")
    assert f"{place}/target" in message
    assert os.listdir(place) == ["mnt"]


def test_a_target_that_is_a_directory(place: Path, mountpoint: Path) -> None:
    (place / "directory").mkdir()
    (place / "directory" / "file").write_bytes(b"data")
    assert "is a directory" in refused(f"file:{place}/directory", mountpoint)
    assert (place / "directory" / "file").read_bytes() == b"data"
    assert sorted(os.listdir(place)) == ["directory", "mnt"]


def _database(path: Path) -> None:
    with closing(sqlite3.connect(path)) as db:
        db.execute("CREATE TABLE precious(data)")
        db.commit()


@pytest.mark.parametrize("kind", ["text", "short", "database", "zeros"])
@pytest.mark.parametrize("options", ["rw", "nocreate", "ro"])
def test_a_target_path_with_a_foreign_file_is_refused(
    place: Path, mountpoint: Path, kind: str, options: str
) -> None:
    path = place / "file"
    if kind == "database":
        _database(path)
    else:
        path.write_bytes({"text": b"precious\n" * 100, "short": b"x", "zeros": bytes(8192)}[kind])
    before = path.read_bytes(), path.stat().st_mtime_ns
    assert "not a warabi target" in refused(f"file:{path}", mountpoint, "-o", options)
    assert (path.read_bytes(), path.stat().st_mtime_ns) == before
    assert sorted(os.listdir(place)) == ["file", "mnt"]


@pytest.mark.parametrize("kind", ["fifo", "socket", "dangling", "loop"])
def test_a_target_that_is_no_regular_file(place: Path, mountpoint: Path, kind: str) -> None:
    path = place / "t"
    with contextlib.ExitStack() as stack:
        if kind == "fifo":
            os.mkfifo(path)
        elif kind == "socket":
            stack.enter_context(socket.socket(socket.AF_UNIX)).bind(str(path))
        else:
            path.symlink_to("t" if kind == "loop" else "nowhere")
        assert str(path) in refused(f"file:{path}", mountpoint)
    assert sorted(os.listdir(place)) == ["mnt", "t"]


def test_a_damaged_target(place: Path, mountpoint: Path) -> None:
    with mounting(f"file:{place}/target", place) as mount:
        for number in range(200):
            (mount.path / f"file{number}").write_bytes(b"data")
    path = place / "target"
    data = bytearray(path.read_bytes())
    data[100:] = b"\xff" * (len(data) - 100)
    path.write_bytes(data)
    assert str(path) in refused(f"file:{path}", mountpoint)
    assert path.read_bytes() == data
    regions = [entry for entry in Path(f"{path}.regions").glob("*/*") if entry.is_file()]
    assert len(regions) == 200  # what a damaged catalogue does not mention is not removed


# Addresses


@contextlib.contextmanager
def stranger(answer: bytes | None) -> Iterator[int]:
    """The port of a server that says *answer* and hangs up, or with None says nothing at all."""
    held: list[socket.socket] = []

    def serve() -> None:
        with contextlib.suppress(OSError):
            while True:
                connection, _ = server.accept()
                held.append(connection)
                if answer is not None:
                    connection.sendall(answer)
                    connection.shutdown(socket.SHUT_WR)

    with socket.create_server(("127.0.0.1", 0)) as server:
        thread = threading.Thread(target=serve)
        thread.start()
        try:
            yield server.getsockname()[1]
        finally:
            server.shutdown(socket.SHUT_RDWR)
            thread.join(PATIENCE)
            for connection in held:
                connection.close()


def test_an_address_without_a_listener_is_refused(mountpoint: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
    assert f"127.0.0.1:{port}" in refused(f"ofi+tcp://127.0.0.1:{port}", mountpoint)
    assert "na+sm://999999999-0" in refused("na+sm://999999999-0", mountpoint)


@pytest.mark.parametrize(
    "answer",
    [
        b"HTTP/1.1 400 Bad Request\r\n\r\n" + b"x" * 1000,
        b"SSH-2.0-OpenSSH_9.6\r\n",
        b"\0" * 10_000,
        b"\xff" * 10_000,
        b"",
        None,
    ],
    ids=["http", "ssh", "zeros", "ones", "hangs_up", "silent"],
)
def test_a_peer_that_speaks_another_protocol(mountpoint: Path, answer: bytes | None) -> None:
    with stranger(answer) as port:
        address = f"tcp://127.0.0.1:{port}"
        assert f"127.0.0.1:{port}" in refused(address, mountpoint, "-o", "timeout=1")
    assert not is_mounted(mountpoint)


def test_a_host_that_does_not_exist(mountpoint: Path) -> None:
    assert "no-such-host.invalid" in refused("tcp://no-such-host.invalid:5555", mountpoint)


@pytest.mark.parametrize("transport", ["na+sm", "tcp"])
def test_a_provider_that_the_engine_does_not_have(mountpoint: Path, transport: str) -> None:
    with serving(transport) as provider:
        other = PROVIDER_ID + 1
        message = refused(provider.address, mountpoint, "-o", f"provider_id={other}")
        assert str(other) in message
    assert not is_mounted(mountpoint)


# /dev/fuse


@pytest.mark.parametrize("foreground", ["", "-f"])
def test_a_machine_without_dev_fuse(mountpoint: Path, foreground: str) -> None:
    words = [*MOUNT, "memory:", str(mountpoint), *foreground.split()]
    script = f"mount -t tmpfs none /dev && exec {shlex.join(words)}"
    message = refused(command=["unshare", "-m", "sh", "-c", script])
    assert "/dev/fuse" in message
    assert not is_mounted(mountpoint)
    assert Path("/dev/fuse").exists()


def test_a_dev_fuse_that_cannot_be_opened(mountpoint: Path) -> None:
    words = shlex.join([*MOUNT, "memory:", str(mountpoint)])
    script = f"mount --bind /dev/null /dev/fuse && exec {words}"
    message = refused(command=["unshare", "-m", "sh", "-c", script])
    assert "Invalid argument" in message
    assert not is_mounted(mountpoint)


# Defects of ours

BROKEN = """
import sys
from warabifs.fs import filesystem
from warabifs.mount import main as mount
good = filesystem.FileSystem.mkdir

async def broken(self, parent, name, *rest):
    if name == b"bad":
        raise RuntimeError("planted by a test")
    return await good(self, parent, name, *rest)

filesystem.FileSystem.mkdir = broken
mount.main(sys.argv[1:])
"""


def test_a_bug_in_a_handler_is_eio_with_a_logged_traceback_and_the_mount_lives_on(
    place: Path,
) -> None:
    class Broken(Mount):
        def command(self, *more: str) -> list[str]:
            words = super().command(*more)
            return [sys.executable, "-c", BROKEN, *words[words.index("warabifs.mount.main") + 1 :]]

    path = place / "mnt"
    path.mkdir()
    mount = Broken("memory:", path, place / "mount.log")
    try:
        mount.start_in_foreground()
        for _ in range(3):
            with fails_with(errno.EIO):
                (path / "bad").mkdir()
        (path / "good").mkdir()
        assert os.listdir(path) == ["good"]
        assert mount.alive
        log = mount.new_log()
        assert log.count("Traceback") == log.count("planted by a test") == 3
        assert "unhandled exception in mkdir" in log
        assert mount.unmount() == 0
    finally:
        mount.close()
    mount.check_log()


# Afterwards


def test_a_refused_mount_leaves_no_process(place: Path, mountpoint: Path) -> None:
    (place / "directory").mkdir()
    refused(f"file:{place}/directory", mountpoint)
    wait_until(lambda: not processes_of(place), "the end of the process")


def test_a_mount_is_possible_after_a_refusal(place: Path) -> None:
    with mounting(f"file:{place}/target", place, start=False) as mount:
        refused(mount.source, mount.path, "-o", "nocreate")
        mount.start()
        (mount.path / "file").write_bytes(b"data")
        assert (mount.path / "file").read_bytes() == b"data"
