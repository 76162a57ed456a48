"""``-o uid=``, ``gid=`` and ``umask=``: shown and stored owners and modes, and permissions."""

from __future__ import annotations

import errno
import os
import stat
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.mount.support import Mount, fails_with, mounting, python, run


@pytest.fixture
def kept(place: Path) -> Iterator[Mount]:
    """A mount of a file target that root filled without options, to be started with some."""
    with mounting(f"file:{place}/target", place) as mount:
        (mount.path / "file").write_bytes(b"data")
        (mount.path / "file").chmod(0o4755)
        (mount.path / "directory").mkdir(mode=0o700)
        (mount.path / "link").symlink_to("file")
        mount.unmount()
        yield mount


def shown(path: Path) -> tuple[int, int, int]:
    info = path.lstat()
    return info.st_uid, info.st_gid, stat.S_IMODE(info.st_mode)


def test_everything_is_shown_with_that_owner_and_those_permissions(kept: Mount) -> None:
    kept.options = ("uid=1234", "gid=daemon", "umask=027")
    kept.start()
    assert shown(kept.path) == (1234, 1, 0o750)
    assert shown(kept.path / "file") == (1234, 1, 0o4750)
    assert shown(kept.path / "directory") == (1234, 1, 0o750)
    assert shown(kept.path / "link") == (1234, 1, 0o777)
    listed = run("find", kept.path, "-printf", "%U %G\n").stdout.split("\n")[:-1]
    assert set(listed) == {"1234 1"}


def test_overrides_do_not_change_stored_owners_and_modes(kept: Mount) -> None:
    before = "0 0 4755", "0 0 700"
    kept.options = ("uid=1234", "gid=4321", "umask=000")
    kept.start()
    kept.path.joinpath("file").chmod(0o600)  # without effect, as on FAT
    assert shown(kept.path / "file") == (1234, 4321, 0o777)  # chmod takes set-id bits away
    with fails_with(errno.EPERM):
        os.chown(kept.path / "file", 0, -1)
    with fails_with(errno.EPERM):
        os.chown(kept.path / "file", -1, 0)
    os.chown(kept.path / "file", 1234, 4321)  # it is so already
    kept.unmount()
    kept.options = ()
    kept.start()
    after = [
        run("stat", "-c", "%u %g %a", kept.path / name).stdout.strip()
        for name in ("file", "directory")
    ]
    assert after == [before[0][:4] + "755", before[1]]


def test_new_files_belong_to_the_owner_shown_and_have_no_set_id_bits(kept: Mount) -> None:
    kept.options = ("uid=1234", "gid=4321")
    kept.start()
    made = kept.path / "made"
    os.close(os.open(made, os.O_CREAT | os.O_WRONLY, 0o6755))
    (kept.path / "subdirectory").mkdir()
    (kept.path / "symlink").symlink_to("x")
    names = ("made", "subdirectory", "symlink")
    first = {name: shown(kept.path / name) for name in names}
    os.chmod(made, 0o6711)
    kept.unmount()
    kept.options = ()
    kept.start()
    assert {shown(kept.path / name)[:2] for name in names} == {(1234, 4321)}
    assert first["made"] == (1234, 4321, 0o755)
    assert shown(made) == (1234, 4321, 0o711)


def test_the_owner_shown_may_do_what_an_owner_may(kept: Mount) -> None:
    kept.options = ("uid=1234", "gid=1234", "umask=077")
    kept.start()
    script = """
import os, sys
os.setgroups([]); os.setgid(int(sys.argv[2])); os.setuid(int(sys.argv[2]))
try:
    open(sys.argv[1] + "/directory/new", "w").write("data")
    os.utime(sys.argv[1] + "/file", (1, 1))
    print("allowed")
except PermissionError:
    print("refused")
"""
    assert python(script, kept.path, "1234") == "allowed\n"
    assert python(script, kept.path, "1235") == "refused\n"


def test_writing_takes_stored_set_id_bits_away(kept: Mount) -> None:
    """Who is shown as the owner is not the one as whom the program would run elsewhere."""
    kept.options = ("uid=1234", "umask=0")
    kept.start()
    script = """
import os, sys
os.setgroups([]); os.setgid(1234); os.setuid(1234)
open(sys.argv[1] + "/file", "r+").write("mine")
os.chmod(sys.argv[1] + "/file", 0o4777)
"""
    python(script, kept.path)
    kept.unmount()
    kept.options = ()
    kept.start()
    assert shown(kept.path / "file") == (0, 0, 0o755)
    assert (kept.path / "file").read_bytes() == b"mine"
