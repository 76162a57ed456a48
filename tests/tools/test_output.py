"""Output files of commands: complete or absent; devices, FIFOs and links are kept."""

from __future__ import annotations

import errno
import os
import resource
import select
import signal
import stat
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.storage.test_checksums import open_target
from tests.support.helpers import PATIENCE, environment, pattern, run_python
from tests.tools.test_cli import COMMAND, fails, ok, serving
from warabi import errors
from warabi._core.output import PRIVATE, output, write_file

OLD = b"what was there before"


def permissions(path: Path) -> int:
    return stat.S_IMODE(path.stat().st_mode)


def content(directory: Path) -> list[str]:
    return sorted(os.listdir(directory))


@pytest.fixture
def small(tmp_path: Path) -> Iterator[Path]:
    """A file system of a MiB."""
    path = tmp_path / "small"
    path.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=1m", "none", path], check=True, timeout=9)
    try:
        yield path
    finally:
        subprocess.run(["umount", path], check=True, timeout=9)


@pytest.mark.parametrize(("mode", "umask", "found"), [
    (None, 0o022, 0o644), (None, 0o077, 0o600), (PRIVATE, 0, 0o600), (0o755, 0o077, 0o755),
])  # fmt: skip
def test_permissions_of_a_new_file(
    mode: int | None, umask: int, found: int, tmp_path: Path
) -> None:
    path = tmp_path / "new"
    before = os.umask(umask)
    try:
        assert write_file(path, b"data", mode) == path
    finally:
        os.umask(before)
    assert (path.read_bytes(), permissions(path)) == (b"data", found)
    assert content(tmp_path) == ["new"]


def test_a_file_that_is_replaced_keeps_what_is_not_its_content(tmp_path: Path) -> None:
    path = tmp_path / "old"
    path.write_bytes(OLD)
    os.chown(path, 1, 2)
    os.setxattr(path, "user.note", b"kept")
    path.chmod(0o6640)  # the set-ID bits were for the old content
    write_file(path, b"new", PRIVATE)
    info = path.stat()
    assert (info.st_uid, info.st_gid, permissions(path)) == (1, 2, 0o640)
    assert (path.read_bytes(), os.getxattr(path, "user.note")) == (b"new", b"kept")
    assert content(tmp_path) == ["old"]


@pytest.fixture(params=["unnamed", "named"])
def temporary(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """The kind of temporary file: named ones are those of file systems without unnamed ones."""
    if request.param == "named":
        original = os.open

        def no_unnamed(path: str, flags: int, *rest: int) -> int:
            if flags & os.O_TMPFILE == os.O_TMPFILE:
                raise OSError(errno.EOPNOTSUPP, os.strerror(errno.EOPNOTSUPP))
            return original(path, flags, *rest)

        monkeypatch.setattr(os, "open", no_unnamed)
    return str(request.param)


def test_a_file_is_complete_when_it_has_its_name(temporary: str, tmp_path: Path) -> None:
    path = tmp_path / "file"
    for data in (b"first", b"second", b"third"):
        before = path.read_bytes() if path.exists() else None
        with output(path) as out:
            out.write(data)
            out.flush()
            assert (path.read_bytes() if path.exists() else None) == before
            hidden = [name for name in content(tmp_path) if name != "file"]
            assert len(hidden) == (temporary == "named")
            if data == b"third":
                path.unlink(missing_ok=True)
        assert (path.read_bytes(), path.stat().st_nlink) == (data, 1)
        assert content(tmp_path) == ["file"]
    with output(tmp_path / "other") as out:
        out.write(b"mine")
        (tmp_path / "other").write_bytes(b"somebody else's")
    assert (tmp_path / "other").read_bytes() == b"mine"
    assert content(tmp_path) == ["file", "other"]


def test_nothing_is_changed_by_a_block_that_fails(temporary: str, tmp_path: Path) -> None:
    for name in ("old", "new"):
        path = tmp_path / name
        if name == "old":
            path.write_bytes(OLD)
        for error in (ZeroDivisionError, KeyboardInterrupt, SystemExit):
            with pytest.raises(error), output(path) as out:
                out.write(bytes(1 << 20))
                assert len(content(tmp_path)) == 1 + (temporary == "named")
                raise error
            assert content(tmp_path) == ["old"]
    assert (tmp_path / "old").read_bytes() == OLD


def test_symbolic_links_are_followed(tmp_path: Path) -> None:
    (tmp_path / "files").mkdir()
    (tmp_path / "links").mkdir()
    (tmp_path / "links" / "relative").symlink_to("../files/one")
    (tmp_path / "links" / "again").symlink_to("relative")
    (tmp_path / "one").symlink_to(tmp_path / "links" / "again")
    for data in (b"first", b"second"):  # to nothing, and to a file
        assert write_file(tmp_path / "one", data) == tmp_path / "files" / "one"
        assert (tmp_path / "one").is_symlink()
        assert (tmp_path / "links" / "relative").is_symlink()
        assert (tmp_path / "files" / "one").read_bytes() == data
        assert content(tmp_path / "files") == ["one"]
    (tmp_path / "directory").symlink_to("files")
    with pytest.raises(errors.ConfigError, match="Is a directory"):
        write_file(tmp_path / "directory", b"")
    (tmp_path / "loop").symlink_to("loop")
    with pytest.raises(errors.StorageError, match="symbolic links"):
        write_file(tmp_path / "loop", b"")


def test_a_file_that_is_a_mount_point_is_refused_before_anything_is_written(
    tmp_path: Path,
) -> None:
    """As a container has it; rename(2) fails with EBUSY."""
    path, other = tmp_path / "file", tmp_path / "other"
    path.write_bytes(OLD)
    other.write_bytes(OLD)
    (tmp_path / "link").symlink_to("file")
    subprocess.run(["mount", "--bind", other, path], check=True, timeout=9)
    try:
        for name in ("file", "link"):
            with (
                pytest.raises(errors.ConfigError, match="is a mount point"),
                output(tmp_path / name),
            ):
                raise AssertionError("the block was entered")
    finally:
        subprocess.run(["umount", path], check=True, timeout=9)
    assert content(tmp_path) == ["file", "link", "other"]
    write_file(path, b"new")
    assert (path.read_bytes(), other.read_bytes()) == (b"new", OLD)


def test_a_file_on_a_file_system_that_is_mounted_is_replaced(small: Path) -> None:
    (small / "file").write_bytes(OLD)
    write_file(small / "file", b"new")
    assert (small / "file").read_bytes() == b"new"


@pytest.mark.parametrize("name", ["", "no/such", "there/", "new/", "there", "file/below", "a\0b"])
def test_what_cannot_be_a_file(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "there").mkdir()
    (tmp_path / "file").write_bytes(OLD)
    with pytest.raises(errors.ConfigError, match=r"^output "):
        write_file(name, b"data")
    assert content(tmp_path) == ["file", "there"]
    assert not content(tmp_path / "there")


def test_no_target_is_replaced(tmp_path: Path) -> None:
    """By its own archive, for one."""
    path = tmp_path / "target"
    with open_target("file", path) as target:
        region = target.create_and_write(b"data", persist=True)
        for name in ("target", "target-wal"):
            with pytest.raises(errors.ConfigError, match=r"is a target or another database"):
                write_file(tmp_path / name, b"data")
    (tmp_path / "link").symlink_to(path)
    for name in ("target", "link"):
        assert "is a target" in fails("export", path, tmp_path / name)
        assert "is a target" in fails("serve", "-t", f"file:{path}", "--address-file", path)
    assert content(tmp_path) == ["link", "target", "target.regions"]
    with open_target("file", path) as target:
        assert target.read(region, 0, 4) == b"data"


def test_devices_stay_devices(tmp_path: Path) -> None:
    for name, minor in (("null", 3), ("full", 7)):
        os.mknod(tmp_path / name, stat.S_IFCHR | 0o666, os.makedev(1, minor))
    (tmp_path / "link").symlink_to("null")
    assert write_file(tmp_path / "null", b"data") is None
    assert write_file(tmp_path / "link", b"data") is None
    with pytest.raises(errors.StorageFull, match=r"full: No space left on device"):
        write_file(tmp_path / "full", b"data")
    for name in ("null", "full"):
        assert stat.S_ISCHR((tmp_path / name).stat().st_mode)
    assert content(tmp_path) == ["full", "link", "null"]


def test_a_fifo_gets_all(tmp_path: Path) -> None:
    path = tmp_path / "fifo"
    os.mkfifo(path)
    data = pattern(1 << 20)
    got: list[bytes] = []
    reader = threading.Thread(target=lambda: got.append(path.read_bytes()), daemon=True)
    reader.start()
    assert write_file(path, data) is None
    reader.join(PATIENCE)
    assert got == [data]
    assert path.is_fifo()


def test_descriptors_of_the_process_are_written_to_where_they_are(tmp_path: Path) -> None:
    path = tmp_path / "log"
    path.write_bytes(OLD)
    script = (
        "from warabi._core.output import write_file; import sys; write_file(sys.argv[1], b'new')"
    )
    for name in ("/dev/stdout", "/dev/fd/1", "/proc/self/fd/1"):
        with open(path, "ab") as log:
            inode = os.fstat(log.fileno()).st_ino
            subprocess.run(
                [sys.executable, "-c", script, name], stdout=log, check=True, timeout=PATIENCE,
                env=environment(),
            )  # fmt: skip
    assert path.read_bytes() == OLD + 3 * b"new"
    assert path.stat().st_ino == inode
    assert content(tmp_path) == ["log"]


WITHOUT_RIGHTS = """
import os, sys
from pathlib import Path
from warabi import errors
from warabi._core.output import output, write_file
top = Path(sys.argv[1])
os.setgroups([2])
os.setgid(2)
os.setuid(1)
for path, words in (
    ("closed/new", "cannot create files in"), ("others", "no write permission"),
    ("sticky/file", "only owners can replace"),
):
    try:
        write_file(top / path, b"data")
        raise AssertionError(path)
    except errors.PermissionDenied as error:
        assert words in str(error), error
write_file(top / "shared", b"data")
write_file(top / "open", b"data")
"""


def test_what_a_user_may_not_do(tmp_path: Path) -> None:
    top = Path("/tmp", f"warabi-output-{os.getpid()}")  # that others may reach
    top.mkdir()
    try:
        (top / "closed").mkdir(mode=0o555)
        (top / "sticky").mkdir()
        os.chown(top / "sticky", 0, 2)
        (top / "sticky").chmod(0o1770)
        for name, group, mode in (
            ("others", 0, 0o644),
            ("shared", 2, 0o664),
            ("open", 0, 0o666),
            ("sticky/file", 0, 0o666),
        ):
            (top / name).write_bytes(OLD)
            os.chown(top / name, 0, group)
            (top / name).chmod(mode)
        top.chmod(0o777)
        done = run_python(WITHOUT_RIGHTS, str(top))
        assert done.returncode == 0, done.stderr
        assert (top / "others").read_bytes() == OLD
        info = (top / "shared").stat()
        assert (info.st_uid, info.st_gid, stat.S_IMODE(info.st_mode)) == (1, 2, 0o664)
        # The group is this user's now: it does not get what another group had.
        info = (top / "open").stat()
        assert (info.st_uid, info.st_gid, stat.S_IMODE(info.st_mode)) == (1, 2, 0o606)
        assert (top / "sticky" / "file").read_bytes() == OLD
        assert content(top / "sticky") == ["file"]
        assert content(top) == ["closed", "open", "others", "shared", "sticky"]
    finally:
        subprocess.run(["rm", "-rf", top], check=True, timeout=9)


@pytest.mark.parametrize("kind", ["file", "link", "dangling", "fifo", "link to a link"])
def test_what_another_user_made_where_all_may(kind: str, tmp_path: Path) -> None:
    """Before this process came, to get what it writes or to have it written elsewhere."""
    top, path = tmp_path / "sticky", tmp_path / "sticky" / "out"
    top.mkdir()
    top.chmod(0o1777)
    mine = tmp_path / "mine"
    if kind == "file":
        path.write_bytes(OLD)
    elif kind == "fifo":
        os.mkfifo(path)
    else:
        path.symlink_to(mine)
        if kind != "dangling":
            mine.write_bytes(OLD)
    os.chown(path, 65534, 65534, follow_symlinks=False)
    given = path
    if kind == "link to a link":
        given = tmp_path / "first"
        given.symlink_to(path)
    with pytest.raises(errors.PermissionDenied, match="another user"):
        write_file(given, b"secret")
    if kind == "file":
        assert path.read_bytes() == OLD
    assert mine.exists() == (kind.startswith("link"))
    assert content(top) == ["out"]
    # Nor does it matter in a directory that is not for all.
    top.chmod(0o755)
    if kind != "fifo":
        write_file(given, b"public")
        assert path.read_bytes() == b"public"


def test_the_directory_s_owner_and_this_user_are_no_others(tmp_path: Path) -> None:
    top = tmp_path / "sticky"
    top.mkdir()
    top.chmod(0o1777)
    os.chown(top, 1, 1)
    for name, owner in (("its", 1), ("own", os.geteuid())):
        (top / name).write_bytes(OLD)
        os.chown(top / name, owner, -1)
        (top / f"{name}-link").symlink_to(name)
        os.chown(top / f"{name}-link", owner, -1, follow_symlinks=False)
        write_file(top / f"{name}-link", b"new")
        assert (top / name).read_bytes() == b"new"


def test_a_pipe_that_does_not_block_and_a_high_descriptor() -> None:
    """As a program with many descriptors may have it."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    assert hard > 1500
    ours, theirs = os.pipe2(os.O_NONBLOCK)
    resource.setrlimit(resource.RLIMIT_NOFILE, (max(soft, 1501), hard))
    try:
        high = os.dup2(theirs, 1500, inheritable=False)
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
    os.close(theirs)
    data, got = pattern(1 << 20), bytearray()

    def read() -> None:
        while len(got) < len(data):
            select.select([ours], [], [], PATIENCE)
            got.extend(os.read(ours, 1 << 16))

    reader = threading.Thread(target=read, daemon=True)
    reader.start()
    try:
        assert write_file(f"/proc/self/fd/{high}", data) is None
        reader.join(PATIENCE)
        assert got == data
    finally:
        os.close(ours)
        os.close(high)


def test_a_full_disk_leaves_the_old_file(small: Path) -> None:
    (small / "old").write_bytes(OLD)
    for name in ("old", "new"):
        with pytest.raises(errors.StorageFull, match=rf"{name}: No space left"), \
                output(small / name) as out:  # fmt: skip
            for _ in range(30):
                out.write(bytes(100_000))
        assert (small / "old").read_bytes() == OLD
        assert content(small) == ["old"]


def test_a_file_that_the_disk_refuses_does_not_appear(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fsync(fd: int) -> None:
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    (tmp_path / "old").write_bytes(OLD)
    monkeypatch.setattr(os, "fsync", fsync)
    for name in ("old", "new"):
        with pytest.raises(errors.StorageError, match="Input/output error"):
            write_file(tmp_path / name, b"data")
    assert (tmp_path / "old").read_bytes() == OLD
    assert content(tmp_path) == ["old"]


def test_a_read_only_directory(small: Path) -> None:
    (small / "old").write_bytes(OLD)
    subprocess.run(["mount", "-o", "remount,ro", small], check=True, timeout=9)
    with pytest.raises(errors.PermissionDenied, match=r"Read-only file system|no write permission"):
        write_file(small / "old", b"new")
    with pytest.raises(errors.PermissionDenied, match="Read-only file system"):
        write_file(small / "new", b"new")
    assert (small / "old").read_bytes() == OLD


# Commands


@pytest.fixture(scope="module")
def target(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[str, str]]:
    """The address of a target, and the ID of a region of 40 MB."""
    with serving("-t", "memory:") as service:
        address = service.address
        yield address, ok("put", address, stdin=pattern(40_000_000)).decode().strip()


@pytest.mark.parametrize("command", ["export", "get"])
def test_commands_leave_what_is_no_file(
    command: str, target: tuple[str, str], tmp_path: Path
) -> None:
    address, region = target
    arguments = [command, address] + ([region] if command == "get" else [])
    for name, minor in (("null", 3), ("full", 7)):
        os.mknod(tmp_path / name, stat.S_IFCHR | 0o666, os.makedev(1, minor))
    (tmp_path / "link").symlink_to("file")
    ok(*arguments, tmp_path / "null")
    assert "full: No space left on device" in fails(*arguments, tmp_path / "full")
    ok(*arguments, tmp_path / "link")
    assert (tmp_path / "link").is_symlink()
    assert permissions(tmp_path / "file") == (0o600 if command == "export" else 0o644)
    assert stat.S_ISCHR((tmp_path / "null").stat().st_mode)
    assert stat.S_ISCHR((tmp_path / "full").stat().st_mode)
    assert "Is a directory" in fails(*arguments, tmp_path)
    assert content(tmp_path) == ["file", "full", "link", "null"]


@pytest.mark.parametrize("command", ["export", "get"])
def test_commands_on_a_full_disk(command: str, target: tuple[str, str], small: Path) -> None:
    address, region = target
    arguments = [command, address] + ([region] if command == "get" else [])
    (small / "old").write_bytes(OLD)
    assert "old: No space left on device" in fails(*arguments, small / "old")
    assert (small / "old").read_bytes() == OLD
    assert content(small) == ["old"]


INTERRUPTED = """
import sys
from warabi.tools.cli import main as cli
from warabi._core import output
write = output.Output.write
def slowly(self, data):
    write(self, data)
    print("writing", flush=True)
    import time; time.sleep(30)
output.Output.write = slowly
cli.main()
"""


@pytest.mark.parametrize(
    ("number", "status"),
    [(signal.SIGINT, 130), (signal.SIGTERM, 143), (signal.SIGHUP, 129), (signal.SIGKILL, -9)],
)
def test_an_interrupt_leaves_the_old_file(
    number: signal.Signals, status: int, target: tuple[str, str], tmp_path: Path
) -> None:
    address, region = target
    path = tmp_path / "old"
    path.write_bytes(OLD)
    with subprocess.Popen(
        [sys.executable, "-c", INTERRUPTED, "get", address, region, str(path)],
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, env=environment(),
    ) as process:  # fmt: skip
        try:
            assert process.stdout is not None
            assert process.stdout.readline() == b"writing\n"
            process.send_signal(number)
            text = process.communicate(timeout=PATIENCE)[1]
        finally:
            process.kill()
    assert (process.returncode, text.strip()) == (status, b"")
    assert path.read_bytes() == OLD
    assert content(tmp_path) == ["old"]


def test_the_address_of_a_service_through_a_fifo_or_a_device(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "fifo")
    os.mknod(tmp_path / "null", stat.S_IFCHR | 0o666, os.makedev(1, 3))
    with serving("-t", "memory:", "--address-file", tmp_path / "fifo") as service:
        address = service.address
        assert (tmp_path / "fifo").read_text() == f"{address}\n"
        service.end()
    with serving("-t", "memory:", "--address-file", tmp_path / "fifo") as service:
        assert service.address  # which serves, and ends, without a reader
        service.end()
    with serving("-t", "memory:", "--address-file", tmp_path / "null") as service:
        assert service.address
        service.end()
    assert content(tmp_path) == ["fifo", "null"]
    (tmp_path / "link").symlink_to("file")
    with serving("-t", "memory:", "--address-file", tmp_path / "link") as service:
        address = service.address
        assert (tmp_path / "file").read_text() == f"{address}\n"
        service.end()
    assert content(tmp_path) == ["fifo", "link", "null"]


def test_a_reader_that_closes_the_pipe(target: tuple[str, str]) -> None:
    address, region = target
    for arguments in (["get", address, region], ["export", address, "-"]):
        with subprocess.Popen(
            [*COMMAND, *arguments], stdout=subprocess.PIPE, stderr=subprocess.PIPE,
            env=environment(),
        ) as process:  # fmt: skip
            assert process.stdout is not None
            assert len(process.stdout.read(100)) == 100
            process.stdout.close()
            assert process.stderr is not None
            assert process.stderr.read() == b""
            assert process.wait(PATIENCE) == 141


def test_standard_output_that_cannot_be_written(target: tuple[str, str]) -> None:
    address, region = target
    for arguments in (["ls", address], ["get", address, region], ["--help"]):
        with open("/dev/full", "wb") as full:
            done = subprocess.run(
                [*COMMAND, *arguments], stdout=full, stderr=subprocess.PIPE, env=environment(),
                timeout=PATIENCE, check=False,
            )  # fmt: skip
        assert done.returncode == 1
        assert done.stderr == b"warabi: standard output: No space left on device\n"
