"""Callers whose user the kernel does not send: what is not known for certain is not root."""

from __future__ import annotations

import os
import subprocess

import pytest

from warabifs.frontends import callers
from warabifs.frontends.callers import UNKNOWN, groups_of, is_root


def test_a_process_is_found_by_its_id() -> None:
    assert is_root(UNKNOWN, os.getpid()) == (os.geteuid() == 0)
    with subprocess.Popen(["cat"], stdin=subprocess.PIPE, user=5, group=6, extra_groups=[7]) as one:
        assert not is_root(UNKNOWN, one.pid)
        groups = groups_of(UNKNOWN, UNKNOWN, one.pid)
        assert groups is not None
        assert groups() == {6, 7}


def test_no_process_is_neither_root_nor_in_a_group() -> None:
    """0: one in another PID namespace."""
    for pid in (0, 1 << 30):
        assert not is_root(UNKNOWN, pid)
        groups = groups_of(UNKNOWN, UNKNOWN, pid)
        assert groups is not None
        assert groups() == set()


@pytest.mark.parametrize("thread", ["Kthread:\t1\n", ""])
def test_a_thread_of_the_kernel_acts_for_others(
    thread: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    status = f"Name:\tnfsd\nUid:\t0\t0\t0\t0\nGid:\t0\t0\t0\t0\nGroups:\t5 \n{thread}"
    monkeypatch.setattr(callers, "_status", lambda pid: status)
    assert not is_root(UNKNOWN, os.getpid())
    groups = groups_of(UNKNOWN, UNKNOWN, os.getpid())
    assert groups is not None
    assert groups() == set()
    assert is_root(0, os.getpid())  # where the kernel says it


@pytest.mark.parametrize(
    ("options", "more", "found"),
    [
        ("rw,idmapped", "", True), ("rw,idmapped,nosuid", "shared:5 ", True),
        ("rw,nosuid", "shared:5 ", False), ("rw", "", False),
    ],
)  # fmt: skip
def test_an_idmapped_mount_is_seen(options: str, more: str, found: bool) -> None:
    other = "49 27 0:45 / /idmapped rw,idmapped - tmpfs none rw\n"
    line = f"50 27 0:46 / /mnt {options} {more}- fuse.warabifs memory: rw,user_id=0\n"
    assert bool(callers._IDMAPPED.search(other + line)) == found
