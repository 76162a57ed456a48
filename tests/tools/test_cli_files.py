"""``warabi cp``, ``sync``, ``ls`` and the other commands on files, as processes of their own."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.support.helpers import PATIENCE, environment, eventually, pattern
from tests.tools.test_cli import COMMAND, Service, fails, handle, ok, on_terminal, run, serving
from warabi._core.attributes import DirectoryEntry
from warabi.client import TargetHandle
from warabi.engine import Engine, client
from warabi.errors import ConfigError, ProtocolError
from warabi.tools.copying import Copier
from warabi.tools.location import Location, parse
from warabi.tools.trees import LocalTree


@pytest.fixture(scope="module")
def service() -> Iterator[Service]:
    with serving("-t", "memory:", "-p", "3") as service:
        service.process.address = service.address  # type: ignore[attr-defined]
        yield service


@pytest.fixture(scope="module")
def target(service: Service) -> Iterator[TargetHandle]:
    with Engine("na+sm", client) as engine:
        yield handle(engine, service.process.address, 3)  # type: ignore[attr-defined]


@pytest.fixture
def root(service: Service, target: TargetHandle, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """The root directory of an empty target, which is also the default."""
    root = f"{service.process.address}/3"  # type: ignore[attr-defined]
    monkeypatch.setenv("WARABI_ADDRESS", root)
    yield root
    for above, _, names in reversed(list(target.walk("/"))):
        for name in names:
            target.unlink_name(os.path.join(above, name))
        if above != "/":
            target.rmdir(above)


@pytest.fixture
def source(tmp_path: Path) -> Path:
    """A directory with files of all kinds."""
    top = tmp_path / "source"
    (top / "a" / "deep").mkdir(parents=True)
    (top / "empty").mkdir()
    (top / "a" / "small").write_bytes(b"small")
    (top / "a" / "two words").touch()
    (top / "a" / "link").symlink_to("small")
    (top / "a" / "deep" / "large").write_bytes(pattern(3_000_000))
    with open(top / "holes", "wb") as file:
        file.seek(5 << 20)
        file.write(b"data")
        file.truncate(20 << 20)
    (top / "a" / "small").chmod(0o751)
    os.utime(top / "a" / "small", ns=(10**18, 10**18 + 123))
    return top


def shape(top: Path) -> dict[str, tuple[object, ...]]:
    """Each path below *top* with what a copy keeps."""
    found: dict[str, tuple[object, ...]] = {}
    for path in top.rglob("*"):
        kept = path.lstat()
        if path.is_symlink():
            what: tuple[object, ...] = (os.readlink(path),)
        elif path.is_dir():
            what = (kept.st_mode,)
        else:
            what = (kept.st_mode, kept.st_mtime_ns, path.read_bytes())
        found[str(path.relative_to(top))] = what
    return found


def outcome(*arguments: str | Path) -> dict[str, int]:
    """What a copy says of itself."""
    found: dict[str, int] = json.loads(ok(*arguments, "--json"))
    return found


def test_copies_in_every_direction(
    root: str, target: TargetHandle, source: Path, tmp_path: Path
) -> None:
    done = outcome("cp", "-r", source, f"{root}/one")
    assert done["files"] == 5
    assert done["bytes"] == 5 + 3_000_000 + (20 << 20)
    region = target.open_name("/one/holes")
    assert sum(size for _, size in target.data_extents(region)) < 1 << 20
    outcome("cp", "-r", ":/one", ":/two")  # the provider copies
    with serving("-t", f"file:{tmp_path}/files") as other:
        there = other.address
        ok("cp", "-r", ":/two", f"{there}/0/three")
        other.end()
    ok("cp", "-r", tmp_path / "files/three", tmp_path / "back")  # opened by the command
    assert shape(tmp_path / "back") == shape(source)
    assert (tmp_path / "back" / "holes").stat().st_blocks < 2000
    ok("cp", source / "a" / "small", source / "holes", f"{tmp_path}/files/")
    assert ok("ls", f"{tmp_path}/files/").split() == [b"holes", b"small", b"three"]
    assert ok("cat", f"file:{tmp_path}/files/small") == b"small"


def test_sync_by_time_by_bytes_and_with_removals(
    root: str, target: TargetHandle, source: Path
) -> None:
    assert outcome("sync", source, ":/s")["files"] == 5
    assert outcome("sync", source, ":/s") == {
        "files": 0, "bytes": 0, "unchanged": 5, "removed": 0, "failed": 0,
    }  # fmt: skip
    small = source / "a" / "small"
    kept = small.stat()
    small.write_bytes(b"SMALL")
    os.utime(small, ns=(kept.st_atime_ns, kept.st_mtime_ns))
    assert outcome("sync", source, ":/s")["files"] == 0
    assert ok("sync", "--dry-run", "--checksum", source, ":/s") == b"copied /s/a/small\n"
    assert outcome("sync", "--checksum", source, ":/s")["files"] == 1
    assert target.read(target.open_name("/s/a/small"), 0, 5) == b"SMALL"
    (source / "holes").unlink()
    (source / "holes").mkdir()  # in the place of a file
    (source / "a" / "link").unlink()
    done = outcome("sync", "--delete", source, ":/s")
    assert (done["removed"], done["failed"]) == (2, 0)
    assert sorted(target.listdir("/s")) == ["a", "empty", "holes"]
    assert sorted(target.listdir("/s/a")) == ["deep", "small", "two words"]
    assert outcome("sync", "--delete", ":/s", source)["unchanged"] == 3


def test_looking_at_names(root: str, source: Path) -> None:
    ok("cp", "-r", source, ":/")
    assert ok("ls", ":/source").split() == [b"a", b"empty", b"holes"]
    assert ok("ls", f"{root}/source/a") == b"deep\nlink\nsmall\ntwo\\040words\n"
    lines = ok("ls", "-l", ":/source/a").decode().splitlines()
    assert re.fullmatch(r"-rwxr-x--x +1 \S+ +\S+ +5 2001-09-0\d \d\d:\d\d small", lines[2]), lines[
        2
    ]
    assert lines[1].endswith("link -> small")
    assert [len(line) for line in lines[:1]] == [len(lines[0])]
    entries = {entry["name"]: entry for entry in json.loads(ok("ls", "--json", ":/source/a"))}
    assert entries["deep"]["type"] == "directory"
    assert entries["small"]["mode"] == "0751"
    assert {len(one["region"]) for one in json.loads(ok("ls", "--json", root))} == {32}
    found = json.loads(ok("stat", "--json", ":/source/a/small"))
    assert found == {**entries["small"], "name": ":/source/a/small"}
    sums = {one["name"]: one for one in json.loads(ok("du", "--json", ":/source"))}
    assert sums[":/source"]["files"] == 5
    assert sums[":/source/a/deep"]["size"] == 3_000_000
    assert len(ok("du", "-s", ":/source").splitlines()) == 1
    space = json.loads(ok("df", "--json"))
    assert space["used"] == 5 + 3_000_000 + (20 << 20)
    about = json.loads(ok("info", "--json"))
    assert about["target"] == root
    assert about["regions"] == 4
    assert json.loads(ok("stats", "--json"))["targets"][0]["provider_id"] == 3


def test_changing_names(root: str, target: TargetHandle) -> None:
    assert ok("mkdir", ":/d") == b""
    assert "File exists" in fails("mkdir", ":/d")
    ok("mkdir", "--parents", ":/d", ":/e/f")
    assert json.loads(ok("put", "--json", ":/d/x", stdin=b"data"))["size"] == 4
    ok("mv", ":/d/x", ":/e")
    ok("put", ":/d/y", stdin=b"other")
    assert "File exists" in fails("mv", "-n", ":/e/x", ":/d/y")
    assert ok("get", ":/e/x") == b"data"
    ok("mv", ":/e", ":/d/g")
    assert target.listdir("/d/g") == ["f", "x"]
    assert "is a directory; -r removes it" in fails("rm", ":/d")
    ok("rm", "-f", ":/d/missing", ":/d/g/x")
    assert "No such file" in fails("rm", ":/d/missing")
    ok("rm", "-r", ":/d")
    assert target.listdir("/") == []


def test_what_cannot_be_copied(root: str, target: TargetHandle, tmp_path: Path) -> None:
    (tmp_path / "d").mkdir()
    os.mkfifo(tmp_path / "d" / "pipe")
    (tmp_path / "d" / "file").write_bytes(b"data")
    assert "is a directory; -r copies it" in fails("cp", tmp_path / "d", ":/")
    done = run("cp", "-r", tmp_path / "d", ":/")
    assert (done.returncode, done.stderr.count(b"\n")) == (1, 1)
    assert b"d/pipe: is neither a file, a directory nor a symbolic link" in done.stderr
    assert target.listdir("/d") == ["file"]
    assert "cannot be copied into itself" in fails("cp", "-r", ":/d", ":/d/below")
    assert "No such file" in fails("cp", tmp_path / "missing", ":/")
    for missing in (":/missing/", f"{tmp_path}/missing/"):
        assert "missing/: is not a directory" in fails("cp", tmp_path / "d" / "file", missing)
    assert target.listdir("/") == ["d"]
    assert "is not a directory" in fails("sync", ":/d/file", tmp_path)
    assert "several sources" in fails("cp", ":/d/file", ":/d/file", ":/new")
    assert "different targets" in fails("mv", ":/d", made(tmp_path / "t"))
    assert "neither a target nor on a mount" in fails("ls", tmp_path)
    assert "no such engine" in fails("cp", "-r", tmp_path / "d", "na+sm://999999999-0/0/x")


@pytest.mark.parametrize("name", ["../out", "/tmp/out", "..", "."])
def test_names_of_a_provider_that_lead_elsewhere(name: str, tmp_path: Path) -> None:
    class Lying(LocalTree):
        def scandir(self, path: str) -> Iterator[DirectoryEntry]:
            for entry in super().scandir(path):
                yield DirectoryEntry(name, entry.attributes)

    (tmp_path / "source").mkdir()
    (tmp_path / "source" / "file").write_bytes(b"data")
    copier = Copier(Lying(), LocalTree(), jobs=1, complain=lambda path, error: None)
    with pytest.raises(ProtocolError, match="is not the name of an entry"):
        copier.run(str(tmp_path / "source"), str(tmp_path / "into"))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["into", "source"]


def made(path: Path) -> Path:
    with serving("-t", f"file:{path}") as service:
        assert service.address
        service.end()
    return path


def test_a_copy_that_does_not_fit(tmp_path: Path) -> None:
    config = tmp_path / "config.json"
    target = {"type": "memory", "config": {"capacity": 10 << 20}}
    config.write_text(json.dumps({"providers": [{"type": "warabi", "config": {"target": target}}]}))
    (tmp_path / "d").mkdir()
    for number in range(20):
        (tmp_path / "d" / f"{number}").write_bytes(bytes(1 << 20))
    (tmp_path / "d" / "big").write_bytes(pattern(9 << 20))
    with serving(config) as service:
        place = f"{service.address}/0"
        assert fails("cp", "-r", tmp_path / "d", f"{place}/d").count("fit") == 1
        found = json.loads(ok("ls", "--json", f"{place}/d"))
        assert all(one["size"] in (1 << 20, 9 << 20) for one in found)
        assert len(json.loads(ok("ls", "--json", place))) == len(found)  # nothing without a name
        service.end()


def many(path: Path, count: int) -> Path:
    """A directory of *count* files of the same bytes."""
    path.mkdir()
    (path / "0").write_bytes(pattern(16384))
    for number in range(1, count):
        os.link(path / "0", path / f"{number}")
    return path


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGKILL])
def test_a_copy_that_is_ended_leaves_whole_files_and_goes_on(
    root: str, target: TargetHandle, tmp_path: Path, number: signal.Signals
) -> None:
    source = many(tmp_path / "many", 3000)
    with subprocess.Popen(
        [*COMMAND, "cp", "-r", str(source), ":/many"], stderr=subprocess.PIPE, env=environment()
    ) as process:
        try:
            eventually(lambda: "many" in target.listdir("/") and target.listdir("/many"))
            process.send_signal(number)
            assert process.stderr is not None
            assert process.stderr.read().strip() == b""
            assert process.wait(PATIENCE) == (130 if number == signal.SIGINT else -number)
        finally:
            process.kill()
    found = [entry.attributes.size for entry in target.scandir("/many")]
    assert set(found) == {16384}
    assert 0 < len(found) < 3000
    assert target.listdir("/") == ["many"]
    done = outcome("cp", "-r", "--resume", source, ":/")
    assert done["files"] + done["unchanged"] == 3000
    assert done["unchanged"] >= len(found) - 300  # those whose time had not been set
    assert len(target.listdir("/many")) == 3000


def test_ctrl_c_again_while_the_provider_does_not_respond(tmp_path: Path) -> None:
    source = many(tmp_path / "many", 3000)
    with serving("-t", "memory:") as service, Engine("na+sm", client) as engine:
        address = service.address
        target = handle(engine, address)
        with subprocess.Popen(
            [*COMMAND, "cp", "-r", str(source), f"{address}/0/many"], stderr=subprocess.PIPE,
            env=environment(),
        ) as process:  # fmt: skip
            try:
                eventually(lambda: "many" in target.listdir("/") and target.listdir("/many"))
                service.process.send_signal(signal.SIGSTOP)
                deadline = time.monotonic() + 20  # far less than the time-out of a request
                while process.poll() is None and time.monotonic() < deadline:
                    process.send_signal(signal.SIGINT)
                    time.sleep(0.3)
                assert process.poll() == 130
                assert process.stderr is not None
                assert process.stderr.read().strip() == b""
            finally:
                process.kill()
                service.process.send_signal(signal.SIGCONT)


def test_output_whose_reader_is_gone(root: str, source: Path) -> None:
    ok("cp", "-r", source, ":/")
    for command in (["cat", ":/source/holes"], ["cp", "-r", "--list", str(source), ":/again"]):
        done = subprocess.run(
            ["bash", "-c", 'set -o pipefail; "$@" | true', "bash", *COMMAND, *command],
            capture_output=True, env=environment(), timeout=PATIENCE, check=False,
        )  # fmt: skip
        assert (done.returncode, done.stderr) == (141, b"")


@pytest.mark.parametrize("columns", [40, 100])
def test_progress_on_a_terminal(root: str, tmp_path: Path, columns: int) -> None:
    (tmp_path / "file").write_bytes(bytes(300 << 20))
    shown = lines_on_terminal(columns, "cp", tmp_path / "file", ":/file")
    assert any(re.search(r"copy.* \d+\.\d [MG]B/s", line) for line in shown), shown
    assert max(map(len, shown)) <= columns
    assert any(re.search(r"\d%" if columns == 40 else r"\d/300", line) for line in shown), shown


def lines_on_terminal(columns: int, *arguments: str | Path) -> list[str]:
    """What a command shows on a terminal of that width, without the codes that move the cursor."""
    shown = re.sub(rb"\x1b\[[0-9;?]*[a-zA-Z]", b"", on_terminal(columns, *arguments))
    return [line for line in re.split(r"[\r\n]+", shown.decode()) if line.strip()]


def test_bench_and_what_top_says_of_it(root: str, target: TargetHandle, tmp_path: Path) -> None:
    with subprocess.Popen(
        [*COMMAND, "top", "--json", "-i", "0.1"], stdout=subprocess.PIPE, env=environment()
    ) as top:
        assert top.stdout is not None
        assert top.stdout.readline()
        for place in (":/", tmp_path):
            found = json.loads(
                ok("bench", place, "--large", "3", "--files", "20", "--threads", "2", "--json")
            )
            assert [(one["name"], one["files"], one["bytes"]) for one in found] == [
                ("write large", 2, 6 << 20), ("read large", 2, 6 << 20),
                ("write small", 40, 40 << 14), ("read small", 40, 40 << 14),
                ("stat", 40, 0), ("remove", 40, 0),
            ]  # fmt: skip
            assert all(one["seconds"] > 0 for one in found)
        stored = 0
        while stored < 40:  # the counts of intervals are those of the benchmark
            stored += operations(json.loads(top.stdout.readline())).get("store", {"count": 0})[
                "count"
            ]
        assert stored == 40
        top.send_signal(signal.SIGINT)
        assert top.wait(PATIENCE) == 130
    assert target.listdir("/") == []
    assert list(tmp_path.iterdir()) == []
    lines = ok("bench", ":/", "--large", "1", "--files", "2").decode().splitlines()
    assert [line[:12].strip() for line in lines[1:]] == [
        "write large", "read large", "write small", "read small", "stat", "remove",
    ]  # fmt: skip


def operations(report: dict[str, Any]) -> dict[str, Any]:
    found: dict[str, Any] = report["targets"][0]["operations"]
    return found


def test_top_fills_a_narrow_screen(root: str) -> None:
    lines = lines_on_terminal(40, "top", "-i", "0.1", "-n", "2")
    assert max(map(len, lines)) <= 40
    assert sum(line.startswith("engine na+sm://") for line in lines) == 2


def test_the_variable_that_is_not_set(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("WARABI_ADDRESS", raising=False)
    assert "the variable WARABI_ADDRESS is not set" in fails("ls")


def test_an_address_without_the_number_of_a_provider() -> None:
    assert "as in na+sm://1-0/0/x" in fails("ls", "na+sm://1-0/x")


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("na+sm://1-0", ("", "na+sm://1-0", 5, "")),
        ("na+sm://1-0/", ("/", "na+sm://1-0", 5, "")),
        ("na+sm://1-0/7", ("", "na+sm://1-0", 7, "")),
        ("na+sm://1-0/7/a/b c", ("/a/b c", "na+sm://1-0", 7, "")),
        ("tcp://[::1]:99/7/", ("/", "tcp://[::1]:99", 7, "")),
        ("warabi://host:1/2/x", ("/x", "ofi+tcp://host:1", 2, "")),
        ("warabi://na+sm:1-0/2/x", ("/x", "na+sm://1-0", 2, "")),
        ("file:t", ("", "", 0, "t")),
        ("file:t/x", ("/x", "", 0, "t")),
        ("warabi+file://{0}/t/x/y", ("/x/y", "", 0, "{0}/t")),
        ("warabi://{0}/t", ("", "", 0, "{0}/t")),
        ("t/", ("/", "", 0, "t")),
        ("t/x/y", ("/x/y", "", 0, "t")),
        ("t", ("t", "", 0, "")),
        ("missing/x", ("missing/x", "", 0, "")),
        (":", ("/base", "na+sm://9-9", 4, "")),
        (":/x", ("/base/x", "na+sm://9-9", 4, "")),
    ],
)
def test_locations(
    text: str, expected: tuple[str, str, int, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("WARABI_ADDRESS", "na+sm://9-9/4/base")
    Path("t").touch()
    found = parse(text.format(tmp_path), 5)
    path, address, provider_id, file = expected
    assert found == Location(found.text, path, address, provider_id, file.format(tmp_path))


@pytest.mark.parametrize("text", ["na+sm://1-0/a", "://", "x y://z"])
def test_malformed_locations(text: str) -> None:
    with pytest.raises(ConfigError):
        parse(text)
