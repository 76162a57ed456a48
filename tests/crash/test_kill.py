"""SIGKILL of the process that serves a target, at random moments: ``tools/crashtest`` as a test."""

from __future__ import annotations

import contextlib
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.crash.oracle import Found, Op, Oracle
from tests.support.helpers import PATIENCE, ROOT, environment, eventually


def mounts_below(path: Path) -> list[str]:
    """Mount points in *path*, found without a system call on any of them."""
    lines = Path("/proc/self/mountinfo").read_text().splitlines()
    points = [line.split()[4] for line in lines]
    return [point for point in points if path in Path(point).parents]


@contextlib.contextmanager
def contained(command: list[str]) -> Iterator[subprocess.Popen[str]]:
    """Run *command* with its temporary files in a directory of its own.

    At the end the processes that it left are killed, and the mounts in that directory removed; a
    mount that is left by a run without errors is one.
    """
    place = Path(tempfile.mkdtemp(prefix="warabi-contained-"))
    process = subprocess.Popen(
        command, env=environment(TMPDIR=str(place)), stdin=subprocess.DEVNULL, text=True,
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, start_new_session=True, cwd=ROOT,
    )  # fmt: skip
    try:
        with process:
            try:
                yield process
            finally:
                # Those that it started too: a mount lives on when the program that tests it dies.
                with contextlib.suppress(ProcessLookupError):
                    os.killpg(process.pid, signal.SIGKILL)
    finally:
        left = mounts_below(place)
        for mountpoint in left:
            # Aborts the connection, so that what waits for the dead mount ends, and detaches it.
            unmount = ["umount", "-i", "-f", "-l", mountpoint]
            subprocess.run(unmount, timeout=PATIENCE, check=False)
        shutil.rmtree(place, ignore_errors=True)
    assert not left or process.returncode != 0, f"left mounted: {left}"


@pytest.mark.timeout(600)
def test_200_rounds_of_kill_9() -> None:
    with contained([str(ROOT / "tools" / "crashtest"), "--rounds", "200"]) as process:
        output, errors = process.communicate(timeout=570)
        assert process.returncode == 0, f"{output}\n{errors[-5000:]}"
    assert re.search(r"seed \d+", output)
    assert "rounds=200" in output


_HANG = """
import os, signal, subprocess, sys, time
mountpoint = os.environ["TMPDIR"] + "/run/mnt"
os.makedirs(mountpoint)
mount = subprocess.Popen([sys.executable, "-m", "warabifs.mount.main", "memory:", mountpoint, "-f"])
while not os.path.ismount(mountpoint):
    time.sleep(0.01)
mount.send_signal(signal.SIGSTOP)
print(mountpoint, flush=True)
os.listdir(mountpoint)
"""


def test_a_run_that_is_given_up_leaves_no_hung_mount() -> None:
    with (
        pytest.raises(RuntimeError, match="given up"),
        contained([sys.executable, "-c", _HANG]) as process,
    ):
        assert process.stdout is not None
        mountpoint = Path(process.stdout.readline().rstrip())
        place = mountpoint.parents[1]
        assert mounts_below(place) == [str(mountpoint)]
        raise RuntimeError("given up")
    assert mounts_below(place) == []
    assert not place.exists()

    def ended() -> bool:
        try:
            os.killpg(process.pid, 0)
        except ProcessLookupError:
            return True
        return False

    eventually(ended)


R1, R2 = b"1" * 16, b"2" * 16


def after(*steps: tuple[Op, bytes | None]) -> Oracle:
    oracle = Oracle()
    for op, rid in steps:
        oracle.begin(op)
        oracle.end(op, rid)
    return oracle


def refuses(oracle: Oracle, found: Found, why: str) -> None:
    with pytest.raises(AssertionError, match=why):
        oracle.check(found)


def test_the_oracle_lists_the_states_allowed_after_a_kill() -> None:
    create = Op("create_and_write", 0, 0, 8, seed=1)
    old, new = create.data, Op("write", 0, 0, 8, seed=2).data
    oracle = after((create, R1))
    for content in (b"", bytes(8), old, old[:3], old[:4] + bytes(4)):
        oracle.check(Found({R1: content}, {}))
    oracle.check(Found({}, {}))
    refuses(oracle, Found({R1: new}, {}), "never was so")
    refuses(oracle, Found({R1: old, R2: b""}, {}), "unknown")
    refuses(oracle, Found({R1: old}, {"name": R1}), "names")

    oracle = after((create, R1), (Op("persist", 0, 0, 8), None), (Op("write", 0, 0, 8, 2), None))
    for content in (old, new, old[:4] + new[4:]):
        oracle.check(Found({R1: content}, {}))
    refuses(oracle, Found({}, {}), "missing")
    refuses(oracle, Found({R1: bytes(8)}, {}), "never was so")
    refuses(oracle, Found({R1: old[:7]}, {}), "7 bytes, not 8 to 8")

    oracle = after((create, R1), (Op("link", 0, name="a"), None), (Op("fsync", 0), None),
                   (Op("rename", 0, name="a", new_name="b"), None))  # fmt: skip
    oracle.check(Found({R1: old}, {"a": R1}))
    oracle.check(Found({R1: old}, {"b": R1}))
    refuses(oracle, Found({R1: old}, {}), "names")
    refuses(oracle, Found({R1: old}, {"a": R1, "b": R1}), "names")
    oracle.end(Op("commit"))
    refuses(oracle, Found({R1: old}, {"a": R1}), "names")

    oracle = after((create, R1), (Op("fsync", 0), None), (Op("erase", 0), None))
    oracle.check(Found({R1: old}, {}))
    oracle.check(Found({}, {}))
    oracle.end(Op("commit"))
    refuses(oracle, Found({R1: old}, {}), "unknown|are there")


def test_the_oracle_continues_from_the_state_found() -> None:
    create = Op("create_and_write", 0, 0, 8, seed=1)
    oracle = after((create, R1))
    oracle.begin(Op("create", 1, 0, 4))
    oracle.adopt(Found({R1: create.data[:2], R2: bytes(4)}, {}))
    assert (oracle.content(0), oracle.content(1)) == (create.data[:2], bytes(4))
    oracle.check(Found({R1: create.data[:2], R2: bytes(4)}, {}))
    refuses(oracle, Found({R1: create.data, R2: bytes(4)}, {}), "8 bytes, not 2 to 2")
