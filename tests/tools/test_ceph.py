"""The clusters that other tests use: complete, and gone when they end."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from tests.support import ceph
from tests.support.helpers import PATIENCE, environment, eventually

pytestmark = pytest.mark.timeout(120)


def daemons(directory: Path) -> list[int]:
    """The processes that have this cluster's configuration."""
    conf = os.fsencode(directory / "ceph.conf")
    found = []
    for process in Path("/proc").iterdir():
        try:
            if process.name.isdigit() and conf in (process / "cmdline").read_bytes().split(b"\0"):
                found.append(int(process.name))
        except OSError:
            continue  # it ended
    return found


def rados(conf: Path, *arguments: object) -> subprocess.CompletedProcess[str]:
    """Ceph's own client of the pool, as the user with the least privileges."""
    user = ("--conf", conf, "--name", "client.warabi", "--pool", "warabi")
    return subprocess.run(
        ["rados", *user, *map(str, arguments)],
        capture_output=True, text=True, timeout=PATIENCE, check=False,
    )  # fmt: skip


@pytest.mark.parametrize("options", [(), ("--auth",)])
def test_a_cluster_survives_a_kill_and_leaves_nothing(
    tmp_path: Path, options: tuple[str, ...]
) -> None:
    directory, data = tmp_path / "cluster", tmp_path / "data"
    data.write_bytes(os.urandom(100_000))
    with ceph.running(directory, *options) as conf:
        assert ceph.run("status", directory).stdout.count("running, process") == 4
        assert len(daemons(directory)) == 4
        assert rados(conf, "put", "object", data).returncode == 0
        ceph.run("kill", 1, directory)
        status = ceph.run("status", directory, check=False)
        assert (status.returncode, "osd.1 not running" in status.stdout) == (1, True)
        assert rados(conf, "put", "other", data).returncode == 0  # by the other two
        ceph.run("start", directory)
        assert ceph.run("status", directory).returncode == 0
        assert rados(conf, "get", "object", tmp_path / "found").returncode == 0
        assert (tmp_path / "found").read_bytes() == data.read_bytes()
        if options:
            (directory / "warabi.keyring").unlink()
            assert rados(conf, "ls").returncode != 0
    assert not directory.exists()
    assert not daemons(directory)


def test_a_start_that_fails_half_way_leaves_nothing(tmp_path: Path) -> None:
    directory, programs = tmp_path / "cluster", tmp_path / "bin"
    programs.mkdir()
    (programs / "ceph-osd").write_text("#!/bin/sh\necho no such device\nexit 1\n")
    (programs / "ceph-osd").chmod(0o755)
    failed = ceph.run("start", directory, check=False, PATH=f"{programs}:{os.environ['PATH']}")
    assert failed.returncode == 1
    assert "no such device" in failed.stderr
    assert not directory.exists()
    assert not daemons(directory)


def test_a_cluster_ends_with_the_process_that_had_it_started(tmp_path: Path) -> None:
    directory = tmp_path / "cluster"
    code = (
        "import sys, time; from pathlib import Path; from tests.support import ceph\n"
        "with ceph.running(Path(sys.argv[1])):\n    print(flush=True)\n    time.sleep(600)"
    )
    with subprocess.Popen(
        [sys.executable, "-c", code, directory], env=environment(), stdout=subprocess.PIPE
    ) as process:
        assert process.stdout is not None
        process.stdout.readline()
        assert len(daemons(directory)) == 4
        process.send_signal(signal.SIGKILL)
    eventually(lambda: not directory.exists() and not daemons(directory))


@pytest.mark.parametrize(
    "arguments",
    [(), ("begin", "x"), ("start",), ("start", "--fast", "x"), ("kill", "3", "x"), ("stop", "-f")],
)
def test_wrong_arguments_are_refused(arguments: tuple[str, ...]) -> None:
    refused = ceph.run(*arguments, check=False)
    assert refused.returncode == 2
    assert refused.stderr.startswith("usage: tools/ceph ")


@pytest.mark.parametrize("action", [("stop",), ("status",), ("kill", "1")])
def test_what_is_no_cluster_is_left_alone(tmp_path: Path, action: tuple[str, ...]) -> None:
    (tmp_path / "file").touch()
    refused = ceph.run(*action, tmp_path, check=False)
    assert refused.returncode == 1
    assert refused.stderr == f"ceph: error: {tmp_path} is no cluster's\n"
    assert ceph.run("start", tmp_path, check=False).returncode == 1
    assert [*tmp_path.iterdir()] == [tmp_path / "file"]
