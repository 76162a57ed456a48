"""The commands, programs and configurations of the README and of docs/, run as they stand there."""

import json
import os
import re
import subprocess
import sys
import tarfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.mount.support import processes_of, wait_until
from tests.support.helpers import ROOT, environment, file_config, provider_process
from warabi.backends import Backend, registry
from warabi.bedrock import Server
from warabifs.mount import manual, options

ENVIRONMENT = {**os.environ, "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"}
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
WALKS = ("README.md", "docs/tutorial.md")
"""Pages whose commands can be run one after the other in a checkout."""


def blocks(page: Path, language: str) -> list[str]:
    """The fenced code blocks of that language."""
    fence = re.compile(rf"^```{language}\n(.*?)^```$", re.DOTALL | re.MULTILINE)
    found: list[str] = fence.findall(page.read_text())
    return found


def all_blocks(language: str) -> list[Any]:
    """Of all pages; the parameters of a test, named after the page."""
    return [
        pytest.param(block, id=f"{page.stem}-{number}")
        for page in PAGES
        for number, block in enumerate(blocks(page, language))
    ]


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
    commands = [command for page in WALKS for command in blocks(ROOT / page, "sh")]
    assert commands[1].split()[0] == "tools/test"  # is what runs this
    del commands[1]
    assert len(commands) >= 3
    done = subprocess.run(
        ["bash", "-c", "set -euxo pipefail\n" + "".join(commands)],
        cwd=checkout, env=ENVIRONMENT, timeout=240, capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    assert re.search(r'user\.warabi\.region="[0-9a-f]{32}"', done.stdout)
    assert not (checkout / "mnt").is_mount()


@pytest.mark.parametrize("script", blocks(ROOT / "docs" / "batch-jobs.md", "sh"))
def test_the_batch_job_runs(script: str, tmp_path: Path) -> None:
    scratch = tmp_path / "scratch"
    scratch.mkdir()
    done = subprocess.run(
        ["bash", "-c", script],
        cwd=tmp_path, env={**ENVIRONMENT, "TMPDIR": str(scratch)}, timeout=60,
        capture_output=True, text=True,
    )  # fmt: skip
    assert (done.returncode, done.stderr) == (0, "")
    assert (tmp_path / "output").read_text() == "INPUT\n"
    with tarfile.open(tmp_path / "results.tar") as archive:
        names = archive.getnames()
    assert {"input", "output"} <= {name.rpartition("/")[2] for name in names}
    assert not list(scratch.iterdir())


def test_the_guide_to_tls(tmp_path: Path) -> None:
    script = "".join(blocks(ROOT / "docs" / "tls.md", "sh"))
    try:
        done = subprocess.run(
            ["bash", "-c", "trap 'kill $(jobs -p) || :' EXIT\nset -euo pipefail\n" + script],
            cwd=tmp_path, env=ENVIRONMENT, timeout=60, capture_output=True, text=True,
        )  # fmt: skip
    finally:
        unmount(tmp_path / "shared")
    assert done.returncode == 0, done.stderr
    region, listed, content = done.stdout.splitlines()
    assert listed.split()[0] == region
    assert content == "shared"


def test_the_command_that_migrates(tmp_path: Path) -> None:
    (command,) = blocks(ROOT / "docs" / "migration.md", "sh")
    with (
        provider_process("na+sm", file_config(tmp_path / "blobs")) as source,
        provider_process("na+sm", {}, {}) as destination,
    ):
        for old, new in (
            ("na+sm://4711-0", source.address),
            ("na+sm://4712-0", destination.address),
            ("/archive", str(tmp_path / "archive")),
        ):
            assert old in command
            command = command.replace(old, new)
        done = subprocess.run(
            ["bash", "-c", command],
            env=environment(PATH=ENVIRONMENT["PATH"]), timeout=60, capture_output=True, text=True,
        )  # fmt: skip
    assert (done.returncode, done.stderr) == (0, "")
    assert (tmp_path / "archive" / "blobs").is_file()


@pytest.mark.parametrize("program", all_blocks("python"))
def test_the_programs_run(program: str, tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", program],
        cwd=tmp_path, env={**ENVIRONMENT, "PYTHONPATH": str(ROOT)},
        timeout=60, capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert done.stdout
    assert not done.stderr


@pytest.mark.parametrize("text", all_blocks("json"))
def test_the_configurations_are_right(
    text: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Services are served; what only names files of certificates and tokens is at least JSON."""
    config = json.loads(text)
    monkeypatch.chdir(tmp_path)
    if "migration" in config:
        config = {"providers": [{"type": "warabi", "config": config}]}
    if "providers" in config:
        with Server("na+sm", config) as server:
            assert len(server.providers) == len(config["providers"])


@pytest.mark.parametrize("backend", registry.loaded(), ids=lambda backend: backend.name)
def test_the_settings_of_backends_are_documented(backend: Backend) -> None:
    """Every one, with its default where that is a number or a truth value."""
    page = (ROOT / "docs" / "backends.md").read_text()
    (title,) = (name for name in backend.names if f"## Settings of `{name}`" in page)
    section = page.split(f"## Settings of `{title}`")[1].split("\n## ")[0]
    rows = dict(re.findall(r"^\| `(\w+)` \| (.*?) \|", section, re.MULTILINE))
    assert set(rows) == set(backend.config.model_fields)
    for key, field in backend.config.model_fields.items():
        if field.is_required():
            assert rows[key] == "required"
        elif isinstance(field.default, int):  # or bool
            assert rows[key] == json.dumps(field.default)


def test_the_table_of_backends_is_complete() -> None:
    table = (ROOT / "docs" / "backends.md").read_text().split("\n## ")[0]
    rows = re.findall(r"^\| (`.*?) \|", table, re.MULTILINE)
    assert {name.strip(" `") for row in rows for name in row.split(",")} == {
        name for backend in registry.loaded() for name in backend.names
    }


def test_the_options_of_mounts_are_documented() -> None:
    """In docs/mount-options.md, the manual page and --help, each with the same explanation."""
    page = (ROOT / "docs" / "mount-options.md").read_text()
    table = page.split("## Table of options\n\n")[1].split("\nThree options")[0]
    assert table == options.markdown(), "run: python -m warabifs.mount.options"
    roff = manual.page().replace("\\-", "-").replace("\\&", "")
    for _, explanation in [*options.rows(), *options.KERNEL.items()]:
        assert explanation in roff
        assert explanation in options.help_text()


@pytest.mark.parametrize("shown", options.KERNEL)
def test_the_options_that_help_shows_are_accepted(
    shown: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Labels too, which need SELinux otherwise."""
    monkeypatch.setattr(options, "_label", lambda name, value: f"{name}={value}")
    for name in shown.replace("x-*", "x-systemd.automount").split(", "):
        options.parse_options([name + "label" * name.endswith("=")], root=True)
