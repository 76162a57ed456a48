"""A mount that a real NFS server, nfs-ganesha, exports, and a client of NFS version 3, libnfs."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.mount.support import SOURCES, Mount, wait_until
from tests.mount.test_file_handles import drop_caches
from tests.support.helpers import PATIENCE, pattern

_PORTS = "nfsport=2049&mountport=20048&version=3"
_CONFIGURATION = """
NFS_CORE_PARAM {{
    NFS_Protocols = 3; NFS_Port = 2049; MNT_Port = 20048;
    Enable_NLM = false; Enable_RQUOTA = false;
}}
NFSv4 {{ Graceless = true; RecoveryBackend = fs; RecoveryRoot = "{place}"; }}
EXPORT {{
    Export_Id = 1; Path = "{mount}"; Pseudo = "/export"; Filesystem_Id = 1.1;
    Access_Type = RW; Squash = No_Root_Squash; SecType = sys; Protocols = 3; Transports = TCP;
    FSAL {{ Name = VFS; }}
}}
"""


class Export:
    """A mount that is exported in a network namespace of its own."""

    def __init__(self, process: subprocess.Popen[bytes], mount: Path, place: Path) -> None:
        self._process, self._mount, self._place = process, mount, place
        self._inside = ["nsenter", f"--net=/proc/{process.pid}/ns/net"]

    def run(self, *command: object) -> bytes:
        words = [*self._inside, *map(str, command)]
        done = subprocess.run(words, capture_output=True, timeout=PATIENCE, check=False)
        assert done.returncode == 0, (done.stderr, (self._place / "log").read_text())
        return done.stdout

    def url(self, path: str) -> str:
        return f"nfs://127.0.0.1{self._mount}/{path}?{_PORTS}"

    def cat(self, path: str) -> bytes:
        return self.run("nfs-cat", self.url(path))

    def store(self, path: str, data: bytes) -> None:
        source = self._place / "source"
        source.write_bytes(data)
        self.run("nfs-cp", source, self.url(path))

    def names(self, path: str = "") -> dict[str, int]:
        """The names in a directory, and their sizes."""
        listing = self.run("nfs-ls", self.url(path)).decode()
        return {line.split()[-1]: int(line.split()[-2]) for line in listing.splitlines()}


@contextlib.contextmanager
def exported(mount: Path, place: Path) -> Iterator[Export]:
    configuration, log = place / "ganesha.conf", place / "log"
    configuration.write_text(_CONFIGURATION.format(mount=mount, place=place))
    # What is unmounted outside is unmounted inside as well; the sockets below /run are its own.
    script = (
        "ip link set lo up && mount -t tmpfs none /run && rpcbind -w &&"
        ' exec ganesha.nfsd -F -L "$1" -f "$2" -p "$3"'
    )
    command = ["unshare", "--net", "--pid", "--fork", "--kill-child", "--mount", "--propagation"]
    command += ["slave", "sh", "-c", script, "sh", str(log), str(configuration), f"{place}/pid"]
    with subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) as process:
        try:

            def ready() -> bool:
                assert process.poll() is None, log.read_text()
                return log.exists() and "NFS SERVER INITIALIZED" in log.read_text()

            wait_until(ready, "the NFS server")
            yield Export(process, mount, place)
        finally:
            children = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text()
            for child in children.split():
                os.kill(int(child), signal.SIGKILL)
            process.wait(PATIENCE)


@pytest.fixture
def export(mounted: Mount, tmp_path: Path) -> Iterator[Export]:
    with exported(mounted.path, tmp_path) as export:
        yield export


@pytest.mark.parametrize("mounted", SOURCES, indirect=True)
def test_a_client_of_nfs_reads_and_writes(mounted: Mount, export: Export) -> None:
    directory = mounted.path / "a" / "b"
    directory.mkdir(parents=True)
    files = {f"file{number}": pattern(number * 1000, number) for number in range(40)}
    for name, data in files.items():
        (directory / name).write_bytes(data)
    assert export.names("a/b") == {name: len(data) for name, data in files.items()}
    drop_caches()
    assert export.cat("a/b/file39") == files["file39"]
    for size in (0, 100, 3 << 20):
        name = f"new{size}"
        export.store(f"a/{name}", pattern(size, 7))
        assert (mounted.path / "a" / name).read_bytes() == pattern(size, 7)
        drop_caches()
        assert export.cat(f"a/{name}") == pattern(size, 7)
    assert set(export.names("a")) == {"b", "new0", "new100", "new3145728"}
