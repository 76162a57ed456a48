"""The documentation site is built without a warning, and has what it is for."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from tests.support.helpers import ROOT
from warabi.tools.cli.main import main


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    output = tmp_path_factory.mktemp("site")
    command = ["-W", "--keep-going", "-q", "-c", "docs/site", "-d", str(output / "doctrees")]
    done = subprocess.run(
        [sys.executable, "-m", "sphinx", *command, ".", output / "html"],
        cwd=ROOT, capture_output=True, text=True, timeout=200, check=False,
    )  # fmt: skip
    assert (done.returncode, done.stderr) == (0, "")
    return output / "html"


@pytest.mark.timeout(240)
def test_every_page_is_part_of_the_site(site: Path) -> None:
    index = (site / "docs/site/index.html").read_text()
    for page in ROOT.glob("docs/*.md"):
        assert f'href="../{page.stem}.html"' in index


def test_the_reference_has_the_methods_and_the_commands(site: Path) -> None:
    python = (site / "docs/site/python.html").read_text()
    for name in ("client.TargetHandle.create_and_write", "aio.Target.changes", "asyncio.connect"):
        assert f'id="warabi.{name}"' in python
    commands = (site / "docs/site/commands.html").read_text()
    for name in main.commands:
        assert f'id="warabi-{name}"' in commands
