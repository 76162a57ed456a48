"""Every example runs, says something, warns of nothing and leaves nothing behind."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.support.helpers import PATIENCE, ROOT, environment

EXAMPLES = sorted((ROOT / "examples").glob("*.py"))


@pytest.mark.parametrize("example", EXAMPLES, ids=lambda path: path.stem)
def test_example(example: Path, tmp_path: Path) -> None:
    temporary, working = tmp_path / "tmp", tmp_path / "cwd"
    temporary.mkdir()
    working.mkdir()
    done = subprocess.run(
        [sys.executable, "-W", "error", example],
        cwd=working, env=environment(TMPDIR=str(temporary)), stdin=subprocess.DEVNULL,
        capture_output=True, text=True, timeout=PATIENCE, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert done.stdout
    assert not done.stderr
    assert not os.listdir(temporary)
    assert not os.listdir(working)


def test_the_list_of_examples_is_complete() -> None:
    listed = (ROOT / "examples" / "README.md").read_text()
    assert EXAMPLES
    for example in EXAMPLES:
        assert listed.count(f"({example.name})") == 1
