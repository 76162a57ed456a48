"""Help, manual pages and completion of the commands."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from tests.support.helpers import PATIENCE, environment
from tests.tools.test_cli import COMMAND, fails, ok, run
from warabi.tools.cli.main import main
from warabifs.mount import manual

MANUALS = Path(__file__).resolve().parents[2] / "docs" / "man"


def test_the_manual_pages_say_what_help_says() -> None:
    pages = manual.pages()
    assert {path.name for path in MANUALS.iterdir()} == pages.keys()
    for name, text in pages.items():
        assert (MANUALS / name).read_text() == text, "run python -m warabifs.mount.manual docs/man"
    for name in main.list_commands(None):  # type: ignore[arg-type]
        assert f'.SS "warabi {name} ' in pages["warabi.1"]


@pytest.mark.parametrize("path", sorted(MANUALS.iterdir()), ids=lambda path: path.name)
def test_manual_pages_render_without_warnings(path: Path) -> None:
    done = subprocess.run(
        ["groff", "-man", "-ww", "-Tutf8", str(path)], capture_output=True, timeout=PATIENCE,
        check=True,
    )  # fmt: skip
    assert done.stderr == b""
    assert len(done.stdout) > 1000


@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
def test_completion_is_installed(
    shell: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_DATA_HOME", str(tmp_path))
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path))
    script = ok("completion", shell)
    path = Path(ok("completion", shell, "--install").decode().strip())
    assert path.is_relative_to(tmp_path)
    assert path.read_bytes() + b"\n" == script
    assert b"_WARABI_COMPLETE" in script


def test_completion_in_bash(tmp_path: Path) -> None:
    """As bash does it when a key is pressed."""
    bin_directory = tmp_path / "bin"
    bin_directory.mkdir()
    program = bin_directory / "warabi"
    program.write_text(f"#!{sys.executable}\nimport sys\nsys.argv[0] = 'warabi'\n{COMMAND[-1]}\n")
    program.chmod(0o755)
    script = (
        f"PATH={bin_directory}:$PATH; cd {tmp_path}; . /dev/stdin\n"
        'complete_words() { COMP_WORDS=("$@"); COMP_CWORD=$(($# - 1)); COMPREPLY=();'
        ' _warabi_completion "$1"; echo "${COMPREPLY[*]}"; }\n'
        "complete_words warabi mk\ncomplete_words warabi cp --res\n"
    )
    done = subprocess.run(
        ["bash", "-c", script], input=ok("completion", "bash"), capture_output=True,
        env=environment(), timeout=PATIENCE, check=True,
    )  # fmt: skip
    assert done.stdout.decode().split("\n")[:2] == ["mkdir", "--resume"]
    assert done.stderr == b""


def test_completion_that_cannot_be_installed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").touch()
    monkeypatch.setenv("XDG_DATA_HOME", str(tmp_path / "file"))
    assert "Not a directory" in fails("completion", "bash", "--install")


def test_what_is_logged() -> None:
    assert run("--log-level", "loud", "ls").returncode == 2
    assert "no such engine" in fails("-vv", "ls", "na+sm://999999999-0")
