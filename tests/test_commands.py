"""The mount's commands, as far as they go without a mount."""

import subprocess
import sys

import pytest

from tests.helpers import PATIENCE, environment


def run(program: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", program, *arguments],
        capture_output=True, text=True, env=environment(), timeout=PATIENCE, check=False,
    )  # fmt: skip


@pytest.mark.parametrize(
    "start", ["from warabifs.entry import mount as main", "from warabifs.cli import main"]
)
def test_without_pyfuse3_one_line_says_what_to_install(start: str) -> None:
    """As after an installation without the extra; ``None`` makes Python refuse the import."""
    hidden = f"import sys; sys.modules['pyfuse3'] = None; {start}; main()"
    done = run(hidden, *(["mount"] if "cli" in start else []), "memory:", "/nowhere")
    assert done.returncode == 1
    assert done.stdout == ""
    assert done.stderr.count("\n") == 1
    assert "pip install" in done.stderr


def test_warabifs_mount_takes_the_arguments_of_mount_warabifs() -> None:
    done = run("from warabifs.cli import main; main()", "mount", "memory:", "/nowhere", "-o", "ro")
    assert done.returncode == 1
    assert done.stderr == "mount.warabifs: mount point /nowhere: does not exist\n"


@pytest.mark.parametrize("start", ["warabifs.entry import mount", "warabifs.mount import main"])
def test_help_lists_the_options(start: str) -> None:
    done = run(f"from {start} as command; command()", "--help")
    assert done.returncode == 0
    assert "provider_id=N" in done.stdout
