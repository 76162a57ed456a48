"""What a mount tells of itself: the file ``.stats``, a dump of its state, and messages as JSON."""

from __future__ import annotations

import errno
import json
import os
import shutil
import signal
import time
from pathlib import Path
from typing import Any

import pytest

from tests.mount.support import (
    PROVIDER_ID,
    Mount,
    fails_with,
    mounting,
    run,
    serving,
    wait_until,
)
from warabi._core.attributes import ROOT
from warabi.errors import ConfigError
from warabifs.fs.report_file import ReportFiles
from warabifs.mount.options import parse_options

NOT_CACHED = "attr_timeout=0,entry_timeout=0"


def report(mount: Mount) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((mount.path / ".stats").read_text())
    return found


def fresh(mount: Mount) -> dict[str, Any]:
    """A report that was made after the call began."""
    now = time.time()
    wait_until(lambda: report(mount)["time"] > now, "a new report")
    return report(mount)


def test_requests_and_bytes_are_counted(place: Path, front_end: str) -> None:
    with mounting("memory:", place, NOT_CACHED) as mount:
        for number in range(7):
            (mount.path / f"d{number}").mkdir()
        (mount.path / "file").write_bytes(bytes(300_000))
        with open(mount.path / "file", "rb") as file:
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
            assert file.read() == bytes(300_000)
        os.symlink("target", mount.path / "link")
        for number in range(7):
            (mount.path / f"d{number}").rmdir()
        with fails_with(errno.ENOTEMPTY):
            (mount.path / "full").mkdir()
            (mount.path / "full" / "file").touch()
            (mount.path / "full").rmdir()
        found = fresh(mount)
        operations = found["operations"]
        assert operations["mkdir"]["count"] == 8
        assert operations["rmdir"]["count"] == 8
        assert operations["rmdir"]["errors"] == {"ENOTEMPTY": 1}
        assert operations["symlink"]["count"] == 1
        assert operations["write"]["bytes"] == 300_000
        assert operations["read"]["bytes"] >= 300_000
        for one in operations.values():
            assert sum(count for _, count in one["buckets"]) == one["count"]
        assert found["kind"] == "mount"
        assert (found["source"], found["mountpoint"]) == ("memory:", str(mount.path))
        assert found["front_end"] == front_end
        assert found["pid"] == mount.pid
        (target,) = found["targets"]
        assert target["target"]["used"] == 300_000
        assert target["target"]["regions"] == 2
        assert target["error"] is None


def test_it_is_a_file_that_can_only_be_read(place: Path) -> None:
    with mounting("memory:", place) as mount:
        path = mount.path / ".stats"
        assert os.listdir(mount.path) == []
        text = path.read_bytes()
        assert path.stat().st_size == len(text)
        shutil.copy(path, mount.path / "copy")
        assert json.loads((mount.path / "copy").read_text())["kind"] == "mount"
        assert run("cp", path, mount.path / "another").stderr == ""
        assert run("tail", "-n1", path).stdout == "}\n"
        assert os.listxattr(path) == []
        with fails_with(errno.ENODATA):
            os.getxattr(path, "user.x")
        for change in (
            lambda: os.open(path, os.O_WRONLY),
            lambda: os.open(path, os.O_RDWR),
            lambda: os.truncate(path, 0),
            lambda: os.chmod(path, 0o777),
            lambda: os.setxattr(path, "user.x", b""),
            lambda: os.utime(path),
        ):
            with fails_with(errno.EPERM):
                descriptor = change()
                try:
                    os.write(descriptor or -1, b"x")
                finally:
                    os.close(descriptor or -1)
        with fails_with(errno.EEXIST):
            path.mkdir()
        with fails_with(errno.ENOENT):
            path.unlink()
        with fails_with(errno.ENOENT):
            (mount.path / "directory").mkdir()
            (mount.path / "directory" / ".stats").read_bytes()
        with open(path, "rb") as first:
            head = first.read(10)
            wait_until(lambda: path.stat().st_ino != os.fstat(first.fileno()).st_ino, "another")
            assert json.loads(head + first.read())  # all of it is one report
        assert (mount.path / "copy").exists()
        mount.check_log()


def test_a_file_of_that_name_is_a_file(place: Path) -> None:
    """One that exists hides the report, and so does another name, or none."""
    source = f"file:{place}/target"
    with mounting(source, place, "stats=report") as mount:
        (mount.path / ".stats").write_text("a file")
        assert json.loads((mount.path / "report").read_text())["source"] == source
    with mounting(source, place) as mount:
        assert (mount.path / ".stats").read_text() == "a file"
        (mount.path / ".stats").rename(mount.path / "moved")
        assert report(mount)["kind"] == "mount"
        (mount.path / "moved").rename(mount.path / ".stats")
        assert (mount.path / ".stats").read_text() == "a file"
        (mount.path / ".stats").unlink()
        assert report(mount)["kind"] == "mount"
    assert not ReportFiles(b"").has(ROOT, b".stats")  # as with stats=


def test_names_that_no_file_can_have() -> None:
    for name in ("a/b", ".", "..", "x" * 256):
        with pytest.raises(ConfigError, match=f"option stats={name}: expected the name of a file"):
            parse_options([f"stats={name}"], root=True)


def test_a_dump_of_the_state_as_json_while_the_provider_hangs(place: Path) -> None:
    with (
        serving("na+sm") as provider,
        mounting(provider.address, place, f"provider_id={PROVIDER_ID}", "log_format=json") as mount,
    ):
        (mount.path / "file").write_bytes(b"data")
        found = fresh(mount)
        assert found["targets"][0]["target"]["used"] == 4
        assert found["targets"][0]["provider_id"] == PROVIDER_ID
        provider.process.send_signal(signal.SIGSTOP)
        try:
            lines: list[str] = []
            mount.signal(signal.SIGUSR1)

            def dumped() -> bool:
                lines.extend(mount.new_log().splitlines())
                return any('"state: }"' in line for line in lines)

            wait_until(dumped, "the state in the log")
        finally:
            provider.process.send_signal(signal.SIGCONT)
        records = [json.loads(line) for line in lines]
        assert {record["level"] for record in records} == {"warning"}
        assert {record["pid"] for record in records} == {mount.pid}
        assert all(record["time"].endswith("+00:00") for record in records)
        state = "\n".join(record["message"] for record in records)
        assert "state: thread MainThread:" in state
        assert "state: tasks of the mount:" in state
        assert "_mount_and_serve" in state
        assert f'"source": "{provider.address}"' in state
