"""SIGKILL of the process that serves a target, at random moments: ``tools/crashtest`` as a test."""

from __future__ import annotations

import re
import subprocess

import pytest

from tests.crash.oracle import Found, Op, Oracle
from tests.support.helpers import ROOT, environment


@pytest.mark.timeout(600)
def test_200_rounds_of_kill_9() -> None:
    command = [str(ROOT / "tools" / "crashtest"), "--rounds", "200"]
    done = subprocess.run(
        command, env=environment(), capture_output=True, text=True, timeout=570, check=False
    )
    assert done.returncode == 0, f"{done.stdout}\n{done.stderr[-5000:]}"
    assert re.search(r"seed \d+", done.stdout)
    assert "rounds=200" in done.stdout


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
