"""Eight processes with all kinds of operations concurrently."""

from __future__ import annotations

import contextlib
import os
import random
from pathlib import Path

from tests.mount.support import another_python


def test_eight_processes_work_side_by_side(where: Path) -> None:
    script = """
import os, sys
root, who = sys.argv[1], sys.argv[2]
for number in range(25):
    directory = f"{root}/{who}-{number}"
    os.mkdir(directory)
    with open(directory + "/a", "wb") as file:
        file.write((who * 1000).encode())
    os.rename(directory + "/a", directory + "/b")
    os.link(directory + "/b", f"{root}/{who}-{number}-link")
    assert open(directory + "/b").read() == who * 1000
    os.unlink(directory + "/b")
    os.rmdir(directory)
    os.listdir(root)
"""
    with contextlib.ExitStack() as stack:
        processes = [stack.enter_context(another_python(script, where, str(n))) for n in range(8)]
        assert [process.wait(60) for process in processes] == [0] * 8
    names = sorted(os.listdir(where))
    assert names == sorted(f"{who}-{n}-link" for who in range(8) for n in range(25))
    sample = random.Random(1).sample(names, 20)
    assert all((where / name).read_bytes() == name[0].encode() * 1000 for name in sample)
