"""The units and fstab lines of ``examples/systemd``, as systemd reads them."""

from __future__ import annotations

import shutil
import sys
from pathlib import Path

import pytest

from tests.mount.support import ROOT, run

EXAMPLES = ROOT / "examples" / "systemd"
GENERATOR = Path("/usr/lib/systemd/system-generators/systemd-fstab-generator")


@pytest.fixture
def units(tmp_path: Path) -> Path:
    """The units, with this environment's ``warabi``."""
    for unit in EXAMPLES.iterdir():
        text = unit.read_text()
        command = Path(sys.executable).parent / "warabi"
        (tmp_path / unit.name).write_text(text.replace("/usr/local/bin/warabi", str(command)))
    return tmp_path


def verified(*units: Path) -> None:
    done = run("systemd-analyze", "verify", "--man=no", *units, check=False)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


def test_the_systemd_units_are_valid(units: Path) -> None:
    verified(units / "warabi.service", units / "srv-warabi.mount")


def test_a_wrong_unit_would_be_found(units: Path) -> None:
    unit = units / "srv-warabi.mount"
    unit.write_text(unit.read_text().replace("Where=/srv/warabi", "Where=/srv/other"))
    with pytest.raises(AssertionError):
        verified(unit)


def test_the_lines_of_fstab_become_units(units: Path) -> None:
    generated = [units / name for name in ("normal", "early", "late")]
    for directory in generated:
        directory.mkdir()
    run("env", f"SYSTEMD_FSTAB={units / 'fstab'}", GENERATOR, *generated)
    mount = generated[0] / "srv-archive.mount"
    text = mount.read_text()
    assert "What=ofi+tcp://127.0.0.1:5555\n" in text
    assert "Type=warabifs\n" in text
    assert "warabi.service" in text
    assert (generated[0] / "srv-archive.automount").exists()
    shutil.copy(units / "warabi.service", generated[0])
    names = ("srv-archive.mount", "srv-archive.automount", "srv-scratch.mount")
    verified(*(generated[0] / name for name in names))
