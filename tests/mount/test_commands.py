"""The mount's commands, as far as they go without a mount."""

import subprocess
import sys

import pytest

from tests.support.helpers import PATIENCE, environment
from warabi.errors import ConfigError
from warabifs.fs.owner_override import Shown
from warabifs.mount.options import parse_options


def run(program: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", program, *arguments],
        capture_output=True, text=True, env=environment(), timeout=PATIENCE, check=False,
    )  # fmt: skip


def test_warabifs_mount_takes_the_arguments_of_mount_warabifs() -> None:
    done = run(
        "from warabifs.mount.cli import main; main()", "mount", "memory:", "/nowhere", "-o", "ro"
    )
    assert done.returncode == 1
    assert done.stderr == "mount.warabifs: mount point /nowhere: does not exist\n"


def test_help_lists_the_options() -> None:
    done = run("from warabifs.mount.main import main; main()", "--help")
    assert done.returncode == 0
    assert "provider_id=N" in done.stdout


def test_the_last_of_two_opposites_counts() -> None:
    options = parse_options(["nosuid,sync,ro", "suid,async,rw,noexec,exec,nodev"], root=True)
    assert options.flags == options.fuse == {"suid", "async", "exec", "nodev"}
    assert not options.read_only


def test_commas_between_quotes_separate_nothing() -> None:
    with pytest.raises(ConfigError, match="context=a:b:c0,c1: SELinux"):
        parse_options(['rw,context="a:b:c0,c1",ro'], root=True)


@pytest.mark.parametrize(
    "option",
    [
        "uid=nobody-of-that-name", "uid=4294967295", "uid=-1", "uid=", "gid=x y", "gid=99999999999",
        "umask=8", "umask=1777", "umask=rwx", "umask=", "uid", "reconnect=-1", "reconnect=x",
        "user_id=0", "size", "size=", "size=5x", "size=-1", "size=101%", "size=1.5g", "size=50 %",
    ],
)  # fmt: skip
def test_bad_values_are_refused(option: str) -> None:
    with pytest.raises(ConfigError, match=option.split("=")[0]):
        parse_options([option], root=True)


def test_owners_by_name_and_number() -> None:
    options = parse_options(["uid=root,gid=12,umask=0022"], root=True)
    assert options.shown == Shown(0, 12, 0o022)
    assert not parse_options(["rw"], root=True).shown


@pytest.mark.parametrize(
    ("text", "size"),
    [("4096", 4096), ("8k", 8 << 10), ("3M", 3 << 20), ("2g", 2 << 30), ("1t", 1 << 40),
     ("25%", 250), ("100%", 1000), ("0", 0)],
)  # fmt: skip
def test_sizes(text: str, size: int) -> None:
    found = parse_options([f"size={text}"], root=True).size
    assert found is not None
    assert found(1000) == size
