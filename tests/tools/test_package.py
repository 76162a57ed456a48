"""What is published: one wheel for every Python from 3.11 on, and a complete sdist."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import sysconfig
import tarfile
import venv
import zipfile
from pathlib import Path

import msgpack
import pytest

from tests.tools.test_readme import blocks
from warabi.aio import Target
from warabi.client import AsyncCreateRequest, AsyncRequest, TargetHandle
from warabi.engine import Engine

ROOT = Path(__file__).resolve().parents[2]
LIMIT = 100
BUILT = {".git", ".venv", "build", "dist", "__pycache__", "warabifs.egg-info"}


def run(*command: str | Path, cwd: Path, **environment: str) -> subprocess.CompletedProcess[str]:
    done = subprocess.run(
        command,
        cwd=cwd,
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
        timeout=LIMIT,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done


def build(source: Path, kind: str, into: Path) -> Path:
    """Build a wheel or sdist of the tree in `source` with the build backend; no network is used."""
    into.mkdir()
    program = (
        "import sys; from setuptools import build_meta as b; getattr(b, sys.argv[1])(sys.argv[2])"
    )
    run(
        sys.executable,
        *("-c", program, f"build_{kind}", into),
        cwd=source,
        SOURCE_DATE_EPOCH="1700000000",
    )
    (built,) = into.iterdir()
    return built


def copy(source: Path, to: Path) -> Path:
    shutil.copytree(source, to, ignore=lambda _, names: BUILT.intersection(names))
    for compiled in to.rglob("*.so"):
        compiled.unlink()
    return to


@pytest.fixture(scope="module")
def sdist(tmp_path_factory: pytest.TempPathFactory) -> Path:
    place = tmp_path_factory.mktemp("sdist")
    archive = build(copy(ROOT, place / "tree"), "sdist", place / "built")
    with tarfile.open(archive) as packed:
        packed.extractall(place, filter="data")
    return place / archive.name.removesuffix(".tar.gz")


@pytest.fixture(scope="module")
def wheel(sdist: Path) -> Path:
    return build(sdist, "wheel", sdist.parent / "wheel")


@pytest.fixture(scope="module")
def client_only(wheel: Path) -> Path:
    """A directory with the wheel and msgpack, and nothing else."""
    place = wheel.parent.parent / "client"
    with zipfile.ZipFile(wheel) as packed:
        packed.extractall(place)
    (place / "msgpack").symlink_to(Path(msgpack.__file__).parent)
    return place


def test_the_sdist_has_all_that_is_in_the_repository(sdist: Path) -> None:
    if (ROOT / ".git").exists():
        listed = run("git", "ls-files", cwd=ROOT).stdout.splitlines()
    else:  # this is an unpacked sdist
        listed = [
            str(file.relative_to(ROOT))
            for file in ROOT.rglob("*.*")
            if not BUILT.intersection(file.parts) and file.suffix != ".so"
        ]
    expected = {name for name in listed if not name.startswith((".ci/", ".gitignore"))}
    assert {name for name in expected if not (sdist / name).exists()} == set()
    assert not list(sdist.rglob("*.so"))


def test_one_wheel_is_for_every_python(wheel: Path) -> None:
    assert "-cp311-abi3-linux_" in wheel.name
    with zipfile.ZipFile(wheel) as packed:
        names = packed.namelist()
    assert "warabi/shm/_fast_path.abi3.so" in names
    tops = {name.partition("/")[0] for name in names}
    packages = {"mochi", "warabi", "warabifs"}
    assert tops == {*packages, "warabifs-0.1.0.dist-info", "warabifs-0.1.0.data"}
    pages = {name.partition(".data/")[2] for name in names if ".data/" in name}
    assert pages == {
        f"data/share/man/{page}"
        for page in ("man1/warabi.1", "man1/warabifs.1", "man8/mount.warabifs.8")
    }
    for typed in ("mochi/margo", "mochi/warabi", "warabi", "warabifs"):
        assert f"{typed}/py.typed" in names


@pytest.fixture(scope="module")
def installed(wheel: Path) -> Path:
    """The interpreter of a fresh environment with the wheel, and the packages that programs use
    beside it."""
    place = wheel.parent.parent / "environment"
    venv.create(place, symlinks=True)
    (packages,) = place.glob("lib/python*/site-packages")
    with zipfile.ZipFile(wheel) as packed:
        packed.extractall(packages)
    (packages / "others.pth").write_text(sysconfig.get_path("purelib") + "\n")
    return place / "bin" / "python"


def checked_types(interpreter: Path, *programs: str | Path) -> str:
    """What ``mypy --strict`` says of programs, as their author runs it."""
    place = interpreter.parents[1]
    done = subprocess.run(
        [
            *(sys.executable, "-m", "mypy", "--strict", "--python-executable", interpreter),
            *("--config-file", os.devnull, "--cache-dir", place / "mypy"),
            *("--scripts-are-modules", *programs),
        ],
        cwd=place,
        capture_output=True,
        text=True,
        timeout=LIMIT,
    )
    return done.stdout + done.stderr


def test_programs_of_users_are_checked_strictly(installed: Path) -> None:
    """Those of the README and of examples/, against the wheel's types."""
    place = installed.parents[1]
    programs = [place / f"example_{path.name}" for path in sorted(ROOT.glob("examples/*.py"))]
    for program in programs:
        shutil.copy(ROOT / "examples" / program.name.removeprefix("example_"), program)
    for number, block in enumerate(blocks(ROOT / "README.md", "python")):
        programs.append(place / f"readme_{number}.py")
        programs[-1].write_text(block)
    said = checked_types(installed, *programs)
    assert said.startswith("Success: no issues found in "), said


REVEALED = """
import mochi.margo, mochi.warabi.client, warabi.aio
engine: mochi.margo.Engine
target: mochi.warabi.client.TargetHandle
remote: warabi.aio.Target
request: mochi.warabi.client.AsyncRequest
creation: mochi.warabi.client.AsyncCreateRequest
"""
UNTYPED = {"engine.config", "remote.call"}
"""A configuration is JSON; results of operations by name depend on the name."""


def test_no_result_of_the_api_is_of_any_type(installed: Path) -> None:
    place = installed.parents[1]
    names = [
        f"{name}.{member}"
        for name, cls in {
            "engine": Engine,
            "target": TargetHandle,
            "remote": Target,
            "request": AsyncRequest,
            "creation": AsyncCreateRequest,
        }.items()
        for member in dir(cls)
        if not member.startswith("_")
    ]
    program = place / "revealed.py"
    program.write_text(REVEALED + "".join(f"reveal_type({name})\n" for name in names))
    found = re.findall(r'Revealed type is "(.*)"', checked_types(installed, program))
    assert len(found) == len(names)
    # What Python itself writes for coroutines; and arrays, of whose elements the API knows nothing.
    known = re.compile(r"Coroutine\[Any, Any, |numpy\.ndarray\[.*?dtype\[Any\]\]")
    untyped = {
        name for name, said in zip(names, found, strict=True) if "Any" in known.sub("", said)
    }
    assert untyped == UNTYPED


def test_a_wheel_is_the_same_wherever_it_is_built(wheel: Path, sdist: Path) -> None:
    elsewhere = copy(sdist, sdist.parent / "deep" / "er")
    again = build(elsewhere, "wheel", sdist.parent / "again")
    assert again.name == wheel.name
    assert again.read_bytes() == wheel.read_bytes()


def isolated(place: Path, program: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    """Run a program with the packages of `place`, and no other but the standard library."""
    first = f"import sys; sys.path.append({str(place)!r}); "
    return subprocess.run(
        [sys.executable, "-I", "-S", "-W", "error", "-c", first + program, *arguments],
        capture_output=True,
        text=True,
        timeout=LIMIT,
    )


def test_the_client_needs_msgpack_alone(client_only: Path) -> None:
    done = isolated(
        client_only,
        "import mochi.margo, mochi.warabi.client as c, warabi.shm.client as s; "
        "engine = mochi.margo.Engine('na+sm', mochi.margo.client); c.Client(engine); "
        "engine.finalize(); print(s.FastPath.__module__)",
    )
    assert (done.returncode, done.stdout) == (0, "warabi.shm._fast_path\n"), done.stderr


@pytest.mark.parametrize(
    ("program", "said"),
    [
        ("import warabi.tools.cli as m; m.command()", "warabi: the package click is missing; "),
        (
            "import warabifs.mount as m; m.warabifs_command()",
            "warabifs: the package click is missing; ",
        ),
        (
            "import warabifs.mount as m; m.mount_command()",
            "mount.warabifs: the package trio is missing; ",
        ),
    ],
)
def test_a_command_says_what_to_install(client_only: Path, program: str, said: str) -> None:
    done = isolated(client_only, program)
    assert done.returncode == 1
    assert done.stderr.startswith(said + "install it with: pip install 'warabifs[")
    assert done.stderr.count("\n") == 1


def test_a_serving_engine_says_what_to_install(client_only: Path) -> None:
    done = isolated(client_only, "from mochi.margo import *; Engine('na+sm', server)")
    said = "the package trio is missing; install it with: pip install 'warabifs[server]'\n"
    assert done.stderr.endswith("ConfigError: " + said)
