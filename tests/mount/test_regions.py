"""Files are regions and regions are files: the mount and Python clients on one target."""

from __future__ import annotations

import errno
import os
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import pytest

from tests.mount.conftest import disposable, limit_of
from tests.mount.support import (
    PROVIDER_ID,
    Mount,
    Provider,
    another_python,
    fails_with,
    line_of,
    mounting,
    run,
    serving,
    wait_until,
    watchdog,
)
from tests.mount.together import client_of, erased, region_of
from warabi import engine as warabi_engine
from warabi.client import Client, TargetHandle
from warabi.region import RegionID

OPTIONS = (f"provider_id={PROVIDER_ID}",)
DOUBTING = (*OPTIONS, "attr_timeout=0", "entry_timeout=0")


class Both(NamedTuple):
    """A provider in a process of its own, a mount of it, and a client of it."""

    provider: Provider
    mount: Mount
    target: TargetHandle

    @property
    def path(self) -> Path:
        return self.mount.path


@pytest.fixture(scope="module", params=["na+sm", "tcp"])
def shared(request: pytest.FixtureRequest) -> Iterator[Both]:
    """The three, for all tests of this module."""
    with (
        disposable("/tmp") as path,
        serving(request.param) as provider,
        mounting(provider.address, path, *OPTIONS) as mount,
        warabi_engine.Engine(request.param, warabi_engine.client) as engine,
    ):
        yield Both(provider, mount, client_of(provider, engine))


@pytest.fixture
def both(request: pytest.FixtureRequest, shared: Both) -> Iterator[Both]:
    """The three, with an empty target."""
    assert list(shared.target.list()) == []
    with watchdog(shared.mount, limit_of(request)):
        yield shared
        if shared.mount.options != OPTIONS:
            remount(shared.mount, *OPTIONS)
        run("find", shared.path, "-mindepth", "1", "-delete")
        wait_until(lambda: not list(shared.target.list()), "the end of the test's regions")
    shared.mount.check_log()


def remount(mount: Mount, *options: str) -> None:
    mount.unmount()
    mount.options = options
    mount.start()


def test_a_region_from_python_is_a_file_under_its_32_hex_digits(both: Both) -> None:
    data = os.urandom(3_000_000)
    region = both.target.create_and_write(data)
    path = both.path / region.hex()
    assert os.listdir(both.path) == [region.hex()]
    assert len(path.name) == 32
    assert path.stat().st_size == len(data)
    assert path.read_bytes() == data
    assert region_of(path) == region


@pytest.mark.parametrize("size", [0, 1, 2048, 2049, 65_536, 65_537])
def test_regions_of_every_size_are_files(both: Both, size: int) -> None:
    data = os.urandom(size)
    region = both.target.create_and_write(data)
    assert (both.path / region.hex()).read_bytes() == data


def test_mv_names_a_region_and_its_id_stays(both: Both) -> None:
    region = both.target.create_and_write(b"data")
    (both.path / "directory").mkdir()
    run("mv", both.path / region.hex(), both.path / "directory" / "name")
    assert os.listdir(both.path) == ["directory"]
    assert (both.path / "directory" / "name").read_bytes() == b"data"
    assert region_of(both.path / "directory" / "name") == region
    assert both.target.stat(region).names == ["/directory/name"]
    assert both.target.read(region, 0, 4) == b"data"


def test_ln_names_a_region_too(both: Both) -> None:
    region = both.target.create_and_write(b"data")
    run("ln", both.path / region.hex(), both.path / "name")
    assert os.listdir(both.path) == ["name"]
    assert both.target.stat(region).names == ["/name"]


def test_a_file_is_read_by_a_client_by_its_id(both: Both) -> None:
    data = os.urandom(2_500_001)
    path = both.path / "file"
    path.write_bytes(data)
    region = region_of(path)
    assert both.target.size(region) == len(data)
    assert both.target.read(region, 0, len(data)) == data
    assert list(both.target.list()) == [region]
    assert both.target.open_name("/file") == region


def test_a_region_keeps_its_id_through_everything_that_happens_to_its_file(both: Both) -> None:
    path = both.path / "file"
    path.write_bytes(b"data")
    region = region_of(path)
    path.write_bytes(b"other data")
    os.truncate(path, 5)
    path.chmod(0o600)
    os.rename(path, both.path / "renamed")
    os.link(both.path / "renamed", both.path / "twin")
    (both.path / "renamed").unlink()
    assert region_of(both.path / "twin") == region
    assert both.target.read(region, 0, 5) == b"other"


def test_the_digits_of_a_named_region_open_it_but_are_no_name_to_remove(both: Both) -> None:
    path = both.path / "file"
    path.write_bytes(b"data")
    digits = both.path / region_of(path).hex()
    assert os.listdir(both.path) == ["file"]
    assert digits.read_bytes() == b"data"
    with fails_with(errno.EPERM):
        digits.unlink()
    with fails_with(errno.EPERM):
        os.rename(digits, both.path / "other")
    assert path.read_bytes() == b"data"


def test_rm_of_the_digits_erases_the_region(both: Both) -> None:
    region = both.target.create_and_write(b"data")
    run("rm", both.path / region.hex())
    assert os.listdir(both.path) == []
    wait_until(lambda: erased(both.target, region), "the end of the region")


def test_rm_of_the_last_name_erases_the_region(both: Both) -> None:
    path = both.path / "file"
    path.write_bytes(b"data")
    region = region_of(path)
    os.link(path, both.path / "twin")
    path.unlink()
    assert both.target.size(region) == 4
    (both.path / "twin").unlink()
    wait_until(lambda: erased(both.target, region), "the end of the region")


def test_a_region_ends_with_its_last_name_though_it_was_opened_by_its_digits(both: Both) -> None:
    path = both.path / "file"
    path.write_bytes(b"data")
    region = region_of(path)
    assert (both.path / region.hex()).read_bytes() == b"data"
    path.unlink()
    wait_until(lambda: erased(both.target, region), "the end of the region")
    assert not (both.path / region.hex()).exists()


def test_replacing_a_file_erases_what_was_there(both: Both) -> None:
    (both.path / "file").write_bytes(b"old")
    (both.path / "new").write_bytes(b"new")
    region, new = region_of(both.path / "file"), region_of(both.path / "new")
    os.rename(both.path / "new", both.path / "file")
    wait_until(lambda: erased(both.target, region), "the end of the region")
    assert region_of(both.path / "file") == new


def test_an_erased_region_is_no_file_any_more_and_its_open_handle_is_stale(both: Both) -> None:
    remount(both.mount, *DOUBTING)
    named, nameless = both.path / "file", both.target.create_and_write(b"data")
    named.write_bytes(b"data")
    for region, path in ((region_of(named), named), (nameless, both.path / nameless.hex())):
        fd = os.open(path, os.O_RDWR)
        try:
            both.target.erase(region)
            assert path.name not in os.listdir(both.path)
            with fails_with(errno.ENOENT):
                path.stat()
            with fails_with(errno.ESTALE):
                os.pread(fd, 100, 0)
            with fails_with(errno.ESTALE):
                os.pwrite(fd, b"x", 0)
            with fails_with(errno.ESTALE):
                os.fsync(fd)
            with fails_with(errno.ESTALE):
                os.fstat(fd)
        finally:
            os.close(fd)
    assert both.mount.alive


def test_a_reused_name_never_shows_the_erased_region(both: Both) -> None:
    path = both.path / "file"
    path.write_bytes(b"old data")
    both.target.erase(region_of(path))
    both.target.link_name(both.target.create_and_write(b"new"), "/file")
    both.mount.remount()
    assert path.read_bytes() == b"new"


def test_the_two_attributes_of_the_target_cannot_be_changed(both: Both) -> None:
    path = both.path / "file"
    path.write_bytes(b"data")
    region, target = region_of(path), os.getxattr(path, "user.warabi.target")
    for name in ("user.warabi.region", "user.warabi.target"):
        refused = run("setfattr", "-n", name, "-v", "00", path, check=False)
        assert refused.returncode != 0
        with fails_with(errno.EPERM):
            os.setxattr(path, name, b"00")
        with fails_with(errno.EPERM):
            os.removexattr(path, name)
    assert region_of(path) == region
    assert os.getxattr(path, "user.warabi.target") == target
    assert os.getxattr(both.path, "user.warabi.target") == target
    with fails_with(errno.ENODATA):
        os.getxattr(both.path, "user.warabi.region")  # a directory is no region


def test_files_copied_with_their_attributes_keep_regions_of_their_own(both: Both) -> None:
    path = both.path / "file"
    path.write_bytes(b"data")
    os.setxattr(path, "user.colour", b"blue")
    run("cp", "-a", path, both.path / "copy")
    run("rsync", "-aX", path, both.path / "rsynced")
    for copy in ("copy", "rsynced"):
        assert os.getxattr(both.path / copy, "user.colour") == b"blue"
        assert region_of(both.path / copy) != region_of(path)


def test_names_given_by_a_client_show_in_the_mount(both: Both) -> None:
    (both.path / "directory").mkdir()
    region = both.target.create_and_write(b"data")
    both.target.link_name(region, "/directory/name")
    assert (both.path / "directory" / "name").read_bytes() == b"data"
    both.target.unlink_name("/directory/name")
    assert os.listdir(both.path / "directory") == []


def test_hundreds_of_nameless_regions_are_listed_after_the_names(both: Both) -> None:
    regions = {both.target.create(size).hex() for size in range(700)}
    names = {f"file{number}" for number in range(50)}
    for name in names:
        (both.path / name).touch()
    listed = os.listdir(both.path)
    assert len(listed) == 750
    assert set(listed) == regions | names
    assert set(run("ls", both.path).stdout.split()) == regions | names
    for digits in regions:
        (both.path / digits).unlink()
    assert set(os.listdir(both.path)) == names


# Close-to-open


def test_a_file_opened_after_a_client_wrote_shows_what_it_wrote(both: Both) -> None:
    path = both.path / "file"
    path.write_bytes(b"1234")
    region = region_of(path)
    assert path.read_bytes() == b"1234"  # now in the page cache, with its size
    for text in (b"5678", b"90ab"):
        both.target.write(region, 0, text)
        assert path.read_bytes() == text


def test_a_file_opened_after_a_client_resized_it_has_that_size(both: Both) -> None:
    path = both.path / "file"
    path.write_bytes(b"1234")
    region = region_of(path)
    for size in (100_000, 3, 5000, 0, 1):
        path.read_bytes()
        both.target.resize(region, size)
        with open(path, "rb") as file:
            assert os.fstat(file.fileno()).st_size == size
            assert len(file.read()) == size


def test_a_file_that_a_client_made_longer_is_appended_to_at_its_end(both: Both) -> None:
    path = both.path / "journal"
    path.write_bytes(b"one ")
    region = region_of(path)
    both.target.resize(region, 8)
    both.target.write(region, 4, b"two ")
    with open(path, "ab") as file:
        file.write(b"three")
    assert both.target.read(region, 0, both.target.size(region)) == b"one two three"


def test_a_client_sees_every_write_of_the_mount_at_once(both: Both) -> None:
    with open(both.path / "file", "w+b", buffering=0) as file:
        region = RegionID(bytes.fromhex(os.getxattr(file.fileno(), "user.warabi.region").decode()))
        for number in range(20):
            file.write(bytes([number]) * 1000)
            assert both.target.size(region) == (number + 1) * 1000
            assert both.target.read(region, number * 1000, 1000) == bytes([number]) * 1000
        file.truncate(10)
        assert both.target.size(region) == 10


def test_two_mounts_of_a_provider_show_one_tree(both: Both, place: Path) -> None:
    (place / "second").mkdir()
    with mounting(both.provider.address, place / "second", *OPTIONS) as second:
        (both.path / "directory").mkdir()
        for text in (b"one", b"two, longer", b"3"):
            (both.path / "directory" / "file").write_bytes(text)
            assert (second.path / "directory" / "file").read_bytes() == text
            (second.path / "directory" / "file").write_bytes(text * 2)
            assert (both.path / "directory" / "file").read_bytes() == text * 2
        os.rename(second.path / "directory" / "file", second.path / "moved")
        assert os.listdir(both.path / "directory") == []
        assert (both.path / "moved").read_bytes() == b"33"


def test_direct_io_shows_a_clients_write_in_a_file_that_is_open(both: Both) -> None:
    remount(both.mount, *DOUBTING, "direct_io")
    path = both.path / "file"
    path.write_bytes(b"1234")
    with open(path, "rb", buffering=0) as file:
        assert os.pread(file.fileno(), 10, 0) == b"1234"
        both.target.write(region_of(path), 0, b"5678")
        assert os.pread(file.fileno(), 10, 0) == b"5678"
        both.target.resize(region_of(path), 6)
        assert os.pread(file.fileno(), 10, 0) == b"5678\0\0"


# Durability over the network


@pytest.mark.parametrize("transport", ["na+sm", "tcp"])
def test_fsync_survives_kill_9_of_the_provider(place: Path, transport: str) -> None:
    target = {"type": "abtio", "config": {"path": f"{place}/target", "create_if_missing": True}}
    data = os.urandom(1_000_000)
    with (
        serving(transport, target) as provider,
        mounting(provider.address, place, *OPTIONS, "reconnect=0") as mount,  # nobody comes back
    ):
        with open(mount.path / "file", "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        region = region_of(mount.path / "file")
        provider.kill()
    with (
        serving(transport, target) as provider,
        mounting(provider.address, place, *OPTIONS) as mount,
    ):
        assert (mount.path / "file").read_bytes() == data
        assert region_of(mount.path / "file") == region


STOPPED = """
import mmap, os, sys
fd = os.open(sys.argv[1], os.O_RDONLY | os.O_DIRECT)
place = mmap.mmap(-1, 1 << 20)
assert os.preadv(fd, [place], 0) == 1 << 20
print("touched", flush=True)
sys.stdin.readline()
place[:] = bytes(1 << 20)
assert os.preadv(fd, [place], 0) == 1 << 20
assert place[-17:] == b"past the provider"
print("done", flush=True)
sys.stdin.readline()
"""


def test_what_a_mount_reads_does_not_pass_through_the_provider() -> None:
    with (
        disposable("/tmp") as path,
        serving("na+sm") as provider,
        # Attributes come from the provider: it is not asked for those meanwhile.
        mounting(provider.address, path, *OPTIONS, "attr_timeout=600") as mount,
        warabi_engine.Engine("na+sm", warabi_engine.client) as engine,
    ):
        target = Client(engine).make_target_handle(provider.address, PROVIDER_ID)
        region = target.create(1 << 20)
        target.write(region, (1 << 20) - 17, b"past the provider")
        target.link_name(region, "/file")
        with another_python(STOPPED, mount.path / "file") as process:
            assert line_of(process) == "touched"
            os.kill(provider.process.pid, signal.SIGSTOP)
            try:
                assert process.stdin is not None
                process.stdin.write("\n")
                process.stdin.flush()
                assert line_of(process) == "done"
            finally:
                os.kill(provider.process.pid, signal.SIGCONT)
