"""``warabi.locate``: from a file on a mount to the region behind it."""

from __future__ import annotations

import contextlib
import errno
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

import warabi
from tests.mount.conftest import disposable
from tests.mount.support import (
    PROVIDER_ID,
    Mount,
    Provider,
    environment,
    fails_with,
    mounting,
    python,
    run,
    serving,
)
from warabi import errors, processes
from warabi.mounted import mounted_path

XATTR = "user.warabi.location"
WARABI = (sys.executable, "-c", "from warabi.tools.cli.main import main; main()")
USER = 4000  # who exists nowhere


@pytest.fixture(scope="module")
def provider() -> Iterator[Provider]:
    with serving("na+sm") as provider:
        yield provider


@pytest.fixture(scope="module")
def mount(provider: Provider) -> Iterator[Mount]:
    options = (f"provider_id={PROVIDER_ID}", "allow_other")
    with disposable("/tmp") as place, mounting(provider.address, place, *options) as mount:
        yield mount


@pytest.fixture
def file(mount: Mount) -> Iterator[Path]:
    """A new file on the mount."""
    path = mount.path / "file"
    path.write_bytes(b"data")
    yield path
    path.unlink()


@pytest.fixture(autouse=True)
def engines() -> Iterator[None]:
    """The engines that these calls share end with the test."""
    yield
    for engine in processes._engines._made.values():
        engine.finalize()


def test_bytes_written_by_either_are_read_by_the_other(mount: Mount, provider: Provider) -> None:
    (mount.path / "directory").mkdir()
    file = mount.path / "directory" / "file"
    file.write_bytes(b"of the mount")
    target, region = warabi.locate(file)
    assert region.hex() == os.getxattr(file, "user.warabi.region").decode()
    assert target.read(region, 0, 12) == b"of the mount"
    target.write(region, 0, b"by")
    assert file.read_bytes() == b"by the mount"
    with file.open("r+b") as opened:
        same, found = warabi.locate(opened.fileno())
        assert found == region
        same.write(region, 0, b"of")
    assert repr(target) == f"TargetHandle({provider.address!r}, {PROVIDER_ID})"


def test_the_attribute_is_virtual(file: Path, mount: Mount, provider: Provider) -> None:
    for path in (file, mount.path):
        assert os.getxattr(path, XATTR) == f"{provider.address}/{PROVIDER_ID}".encode()
        assert XATTR not in os.listxattr(path)
        with fails_with(errno.EPERM):
            os.setxattr(path, XATTR, b"na+sm://1-0/1")
        with fails_with(errno.EPERM):
            os.removexattr(path, XATTR)


def test_a_file_that_may_not_be_written_gives_a_read_only_handle(
    file: Path, place: Path, provider: Provider
) -> None:
    assert file.read_bytes() == b"data"
    with mounting(provider.address, place, f"provider_id={PROVIDER_ID}", "ro") as reading:
        target, region = warabi.locate(reading.path / "file")
        assert target.read(region, 0, 4) == b"data"
        with pytest.raises(errors.PermissionDenied, match="read-only"):
            target.write(region, 0, b"more")


# Another user cannot connect to an engine on this host, but learns where it is.
AS_USER = f"""
import os, sys
import warabi.mounted, warabi.client
os.setgroups([]); os.setgid({USER}); os.setuid({USER})
try:
    print(warabi.mounted._engine(sys.argv[1], "x"))
except OSError as error:
    print(error.strerror)
"""


@pytest.mark.parametrize(
    ("mode", "owner", "may"),
    [(0o600, 0, False), (0o644, 0, True), (0o600, USER, True), (0o200, USER, False)],
)
def test_the_location_is_for_those_who_may_read(
    file: Path, mode: int, owner: int, may: bool
) -> None:
    file.chmod(mode)
    os.chown(file, owner, owner)
    answer = python(AS_USER, file).strip()
    assert answer.endswith(f", {PROVIDER_ID})") if may else answer == "Permission denied"


def test_a_directory_that_may_not_be_searched(mount: Mount) -> None:
    (mount.path / "closed").mkdir(mode=0o700)
    file = mount.path / "closed" / "file"
    file.touch()
    assert python(AS_USER, file).strip() == "Permission denied"


def test_an_engine_that_refuses_this_user(file: Path) -> None:
    file.chmod(0o644)
    script = (
        "import os, sys, warabi.mounted, warabi.client\n"
        f"os.setgroups([]); os.setgid({USER}); os.setuid({USER})\n"
        "try: warabi.locate(sys.argv[1])\n"
        "except (warabi.client.Exception, OSError) as error: print(type(error).__name__, error)\n"
    )
    # Sockets of root's engines are in a directory of root's.
    answer = python(script, file)
    assert answer.startswith(("PermissionDenied", "ConnectionFailed")), answer
    assert answer.count("\n") == 1


def test_what_has_no_region_or_no_mount(mount: Mount, tmp_path: Path) -> None:
    with pytest.raises(errors.ConfigError, match="is not a regular file"):
        warabi.locate(mount.path)
    (tmp_path / "file").touch()
    with pytest.raises(errors.ConfigError, match="is not on a mount of warabifs"):
        warabi.locate(tmp_path / "file")
    with pytest.raises(FileNotFoundError):
        warabi.locate(mount.path / "missing")


def test_an_attribute_that_another_file_system_stores_is_not_believed(tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.touch()
    with contextlib.suppress(OSError):  # not every file system has attributes
        os.setxattr(path, XATTR, b"ofi+tcp://127.0.0.1:1/0")
    with pytest.raises(errors.ConfigError, match="is not on a mount of warabifs"):
        warabi.locate(path)


@pytest.mark.parametrize("kind", ["memory", "file"])
def test_a_mount_without_an_engine(kind: str, place: Path) -> None:
    source = "memory:" if kind == "memory" else f"file:{place}/target"
    with mounting(source, place) as mount:
        file = mount.path / "file"
        file.touch()
        assert os.getxattr(file, XATTR).decode() == source
        with pytest.raises(errors.ConfigError, match=f"mount of {source}, which no engine serves"):
            warabi.locate(file)


def test_paths_on_a_mount(mount: Mount, place: Path, provider: Provider) -> None:
    mnt = mount.path
    (mnt / "a" / "b").mkdir(parents=True)
    (mnt / "a" / "gone").symlink_to("missing")
    (place / "link").symlink_to(mnt / "a")
    bound = place / "bound"
    bound.mkdir()
    inside = {
        mnt: "/", mnt / "a/new": "/a/new", place / "link/b": "/a/b", mnt / "a/gone": "/a/gone",
        bound: "/a", bound / "b": "/a/b",
    }  # fmt: skip
    run("mount", "--bind", mnt / "a", bound)
    try:
        found = {path: mounted_path(str(path)) for path in inside}
    finally:
        run("umount", bound)
    assert found == {path: (provider.address, PROVIDER_ID, there) for path, there in inside.items()}
    assert mounted_path(str(place)) is None


def test_commands_reach_the_engine_by_a_path_on_its_mount(
    file: Path, mount: Mount, tmp_path: Path
) -> None:
    assert run(*WARABI, "cat", file).stdout == "data"
    run(*WARABI, "cp", file, mount.path / "copy")  # within the target
    run(*WARABI, "mv", mount.path / "copy", mount.path / "moved")
    run(*WARABI, "cp", "-r", mount.path / "moved", tmp_path)
    assert (tmp_path / "moved").read_text() == "data"
    assert "moved" in run(*WARABI, "ls", mount.path / ".").stdout.split()
    run(*WARABI, "rm", mount.path / "moved")
    assert not (mount.path / "moved").exists()


def test_a_command_on_a_mount_without_an_engine(place: Path) -> None:
    with mounting("memory:", place) as mount:
        done = run(*WARABI, "ls", mount.path, check=False)
    assert done.returncode == 1
    assert done.stderr.endswith(
        "mount of memory:, which no engine serves; only the mount can access it\n"
    )
    assert done.stderr.count("\n") == 1


def test_the_other_front_end(provider: Provider, place: Path) -> None:
    options = (f"provider_id={PROVIDER_ID}", "frontend=pyfuse3")
    with mounting(provider.address, place, *options) as mount:
        (mount.path / "file").write_bytes(b"data")
        target, region = warabi.locate(mount.path / "file")
        assert target.read(region, 0, 4) == b"data"


def test_importing_the_package_stays_cheap() -> None:
    script = "import sys, warabi; assert 'warabi.client' not in sys.modules"
    subprocess.run([sys.executable, "-c", script], env=environment(), timeout=60, check=True)
