"""The README's commands and programs, run as they stand there."""

import os
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.mount.support import processes_of, wait_until

ROOT = Path(__file__).parents[2]
README = (ROOT / "README.md").read_text()
ENVIRONMENT = {**os.environ, "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"}


def blocks(language: str) -> list[str]:
    found: list[str] = re.findall(rf"^```{language}\n(.*?)^```$", README, re.DOTALL | re.MULTILINE)
    return found


def unmount(path: Path) -> None:
    if path.is_mount():
        subprocess.run(["fusermount3", "-u", "-z", path], check=False, timeout=30)


@pytest.fixture
def checkout() -> Iterator[Path]:
    """The checkout, whose ./data and ./mnt are put back as they were afterwards."""
    data, mnt = ROOT / "data", ROOT / "mnt"
    assert not mnt.is_mount(), f"{mnt} is in use, unmount it first"
    had_mnt = mnt.exists()
    aside = ROOT / "data.aside"
    if data.exists():
        data.rename(aside)
    try:
        yield ROOT
    finally:
        unmount(mnt)
        wait_until(lambda: not processes_of(data), "the end of what persists there")
        subprocess.run(["rm", "-rf", data], check=True, timeout=60)
        if aside.exists():
            aside.rename(data)
        if not had_mnt and mnt.exists():
            mnt.rmdir()


@pytest.mark.timeout(300)
def test_the_commands_run(checkout: Path) -> None:
    commands = blocks("sh")
    assert commands[1].split()[0] == "tools/test"  # is what runs this
    script = "set -euxo pipefail\n" + "".join(commands[:1] + commands[2:])
    done = subprocess.run(
        ["bash", "-c", script],
        cwd=checkout, env=ENVIRONMENT, timeout=240, capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    assert re.search(r'user\.warabi\.region="[0-9a-f]{32}"', done.stdout)
    assert not (checkout / "mnt").is_mount()


@pytest.mark.parametrize("program", blocks("python"))
def test_the_programs_run(program: str, tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", program],
        cwd=tmp_path, env={**ENVIRONMENT, "PYTHONPATH": str(ROOT)},
        timeout=60, capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert done.stdout
    assert not done.stderr


def test_the_table_of_backends_is_complete() -> None:
    from warabi.backends import STORAGES

    table = README.split("## Backends")[1].split("##")[0]
    rows = re.findall(r"^\| (`.*?) \|", table, re.MULTILINE)
    assert {name.strip(" `") for row in rows for name in row.split(",")} == set(STORAGES)
