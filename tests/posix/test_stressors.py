"""Programs that are made to break file systems, each with its own verification.

A few seconds each; set WARABIFS_STRESS_SECONDS for another number.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.mount.conftest import disposable
from tests.mount.support import BACKENDS, Mount, mounting, run, source_of, watchdog

SECONDS = int(os.environ.get("WARABIFS_STRESS_SECONDS", "2"))
LIMIT = SECONDS + 300.0
"""Seconds that a tool may take to end on a busy machine: some of stress-ng's stressors look at the
time only after each few thousand files, and remove those then."""
pytestmark = pytest.mark.timeout(2 * LIMIT)

# stress-ng's stressors by what they strain, with how many of each run side by side.  Not
# `io-uring`, which fails on a tmpfs too (fio's engine of that name does not).
STRESSORS = {
    "names": "dentry rename=2 link symlink mknod dir getdent dirmany filename touch",
    "attributes": "fstat utime chmod=2 chown=2 access xattr=2 fcntl flock=2 lockf=2 lockofd=2"
    " lease chattr inotify",
    "data": "hdd iomix seek sync-file msync readahead aio aiol copy-file sendfile splice"
    " open revio fallocate dup",
}
SMALL = "hdd=16M iomix=16M seek=16M copy-file=128M sync-file=16M readahead=16M fallocate=16M"


@pytest.fixture(scope="module", params=[*BACKENDS, "engine"])
def mount(request: pytest.FixtureRequest) -> Iterator[Mount]:
    """A mount for all tests of this module."""
    with (
        disposable("/tmp") as path,
        source_of(request.param, path) as (source, options),
        mounting(source, path, *options) as mount,
    ):
        yield mount


@pytest.fixture
def inside(mount: Mount) -> Iterator[Path]:
    """The mount's root directory, which has to be empty again at the end."""
    with watchdog(mount, 1.9 * LIMIT):
        yield mount.path
        assert os.listdir(mount.path) == []
        mount.check_log()


@pytest.mark.parametrize("group", STRESSORS)
def test_stress_ng_finds_no_fault(inside: Path, group: str) -> None:
    arguments = []
    for stressor in STRESSORS[group].split():
        name, _, count = stressor.partition("=")
        arguments += [f"--{name}", count or "1"]
    for size in SMALL.split() if group == "data" else ():
        name, _, amount = size.partition("=")
        arguments += [f"--{name}-{'size' if name == 'seek' else 'bytes'}", amount]
    # The second alarm is for stress-ng itself, whose children can miss their own on a busy machine.
    done = run(
        "timeout", "--signal=ALRM", "--preserve-status", "--foreground", f"{SECONDS + 30}s",
        "stress-ng", *arguments, "--timeout", f"{SECONDS}s", "--verify", "--metrics-brief",
        "--oomable", "--temp-path", inside, timeout=LIMIT, check=False,
    )  # fmt: skip
    said = done.stdout + done.stderr
    assert done.returncode == 0, said
    assert not re.search("fail|skip|unsupported", said.replace("failed: 0", "")), said


ENGINES = {
    "sync": ["--ioengine=sync", "--fsync=64"],
    "psync_direct": ["--ioengine=psync", "--direct=1"],
    "pvsync2": ["--ioengine=pvsync2"],
    "mmap": ["--ioengine=mmap", "--fsync=64"],
    "libaio": ["--ioengine=libaio", "--iodepth=16", "--direct=1"],
    "io_uring": ["--ioengine=io_uring", "--iodepth=16"],
    "io_uring_direct": ["--ioengine=io_uring", "--iodepth=16", "--direct=1"],
    "posixaio": ["--ioengine=posixaio", "--iodepth=8"],
}


@pytest.mark.parametrize("engine", ENGINES)
def test_fio_reads_what_it_wrote_with_every_engine(inside: Path, engine: str) -> None:
    """Random blocks of random sizes, each with its place and a checksum in it, read back."""
    size = 8 if SECONDS <= 2 else 4 * SECONDS
    run(
        "fio", "--name=verify", f"--directory={inside}", f"--size={size}M", "--rw=randrw",
        "--bssplit=4k/40:16k/40:128k/20", "--blockalign=4k", "--verify=crc32c-intel",
        "--verify_fatal=1", "--do_verify=1", "--verify_state_save=0", "--unlink=1",
        "--group_reporting", "--numjobs=2", *ENGINES[engine], timeout=LIMIT,
    )  # fmt: skip


def test_dbench_replays_a_file_server_s_day(inside: Path) -> None:
    done = run(
        "dbench", "-c", "/usr/share/dbench/client.txt", "-D", inside, "-t", str(SECONDS), "-x", "4",
        timeout=LIMIT,
    )  # fmt: skip
    assert re.search(r"Throughput [0-9.]+ MB/sec", done.stdout), done.stdout
    assert "fail" not in done.stdout.lower()
    run("find", inside, "-mindepth", "1", "-delete")
    assert os.listdir(inside) == []


@pytest.mark.parametrize("mount", BACKENDS, indirect=True, scope="module")
def test_bonnie_finds_what_it_made(inside: Path) -> None:
    done = run(
        "/usr/sbin/bonnie++", "-d", inside, "-u", "0:0", "-s", "16M", "-r", "8M", "-f",
        "-n", f"1:2000:100:{SECONDS}", "-m", "mount", "-q", timeout=LIMIT,
    )  # fmt: skip
    assert done.stdout.startswith(("1.9", "2.")), done.stdout + done.stderr
    assert "Can't" not in done.stderr
