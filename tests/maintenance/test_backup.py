"""Export and import of targets: complete, atomic, and concurrent with clients."""

from __future__ import annotations

import contextlib
import errno
import gzip
import io
import os
import random
import shutil
import signal
import stat
import subprocess
import sys
import tarfile
import threading
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import msgpack
import pytest

from tests.storage.test_checksums import open_target, region_file
from tests.support.helpers import (
    MEMORY,
    PATIENCE,
    environment,
    eventually,
    file_config,
    open_memory,
    pattern,
    pmem_config,
    provider_process,
)
from tests.target.test_upgrade import DATA
from tests.tools.test_cli import COMMAND, fails, ok, run
from warabi import errors
from warabi._core.attributes import APPEND_ONLY, IMMUTABLE, NO_DUMP
from warabi.in_process.link import DirectLink, Link
from warabi.metadata.domain import Row
from warabi.provider.core import ProviderCore
from warabi.region import RegionID
from warabi.target.config import MemoryConfig
from warabi.target.entries import ArchiveEntry, unpack, unpack_all
from warabi.target.graft import _Graft
from warabi.target.target import Target
from warabi.tools.access import owned, served
from warabi.tools.archive.export import export
from warabi.tools.archive.restore import restore

MiB = 1 << 20


HOLES = 3 * MiB + 5
SPARSE = {
    b"hole": (),
    b"begins with data": (0,),
    b"ends with data": (HOLES - 5000,),
    b"x" * 200: (100_000, MiB, MiB + 200_000, 2 * MiB),
}


def fill(target: Target) -> None:
    """Some of everything that a target may hold."""
    names = target.namespace
    above = names.mkdir(1, b"dir", 0o2751, 3, 4)
    below = names.mkdir(above.ino, b"below " + b"x" * 200, 0o700, 0, 0)
    sizes = {b"empty": 0, b"small": 3, b"\xff\xfe not text": 512, b"big": 9 * MiB}
    for name, size in sizes.items():
        made = names.mknod(below.ino, name, 0o640, 1000, 0)
        target.write(made.region, 0, pattern(size), extend=True)
    for name, offsets in SPARSE.items():
        made = names.mknod(above.ino, name, 0o640, 1000, 0)
        target.resize(made.region, HOLES)
        for offset in offsets:
            target.write(made.region, offset, pattern(5000))
    big = names.lookup(below.ino, b"big")
    names.link(big.ino, 1, b"hard")
    names.setattr(big.ino, gid=2**31, atime_ns=-1, mtime_ns=1_234_567_890_123_456_789)
    names.setxattr(big.ino, b"user.bytes", bytes(range(256)))
    names.setxattr(big.ino, b"user.a=b\xff", b"")
    names.setxattr(above.ino, b"trusted.text", b"text")
    names.setxattr(1, b"user.root", b"yes")
    names.symlink(above.ino, b"link", b"../hard", 5, 6)
    names.symlink(1, b"dangling", b"n\xffwhere", 5, 6)
    link = names.lookup(above.ino, b"link")
    names.link(link.ino, 1, b"hard symlink")
    for kind, rdev in ((stat.S_IFIFO, 0), (stat.S_IFSOCK, 0), (stat.S_IFCHR, os.makedev(1, 3))):
        names.mknod(1, b"special %d" % kind, kind | 0o600, 7, 8, rdev)
    target.create_and_write(pattern(70_000, 1))
    names.setxattr(target.create(0).slot, b"user.x", b"of a nameless one")
    names.setattr(1, mode=0o711, uid=9)
    names.setattr(above.ino, mtime_ns=1)
    target.set_flags(big.ino, IMMUTABLE)
    target.set_flags(below.ino, IMMUTABLE | NO_DUMP)
    target.set_flags(above.ino, APPEND_ONLY)


def everything(link: Link) -> dict[bytes, tuple[Any, ...]]:
    """Every entry by path with its content; of slots only whether they are the same."""
    listing = link.call("survey")
    data = io.BytesIO(bytes(listing.size))
    link.read_into(listing.region, 0, data.getbuffer())
    link.call("unpin", listing.ino, 1)
    found: dict[bytes, tuple[Any, ...]] = {}
    first: dict[int, bytes] = {}
    for entry in unpack_all(data):
        content = memoryview(bytearray(entry.row.size if entry.is_region else 0))
        if content:
            link.read_into(entry.region, 0, content)
        same = first.setdefault(entry.row.ino, entry.path)
        kept = entry if entry.is_region else entry.changed(ino=0, generation=0)
        # The target's own listing went, which changes nothing; a directory's size is none.
        found[entry.path] = (kept, same, bytes(content))
    return found


def without_ids(found: dict[bytes, tuple[Any, ...]]) -> list[Any]:
    """As ``everything``, but for the IDs of regions."""
    plain = []
    for path, (entry, same, content) in found.items():
        assert isinstance(entry, ArchiveEntry)
        nameless = entry.row.anonymous
        plain.append(
            (b"" if nameless else path, entry.changed(ino=0, generation=0)._replace(path=b""),
             b"" if nameless else same, content)
        )  # fmt: skip
    return sorted(plain)


@contextlib.contextmanager
def link_to(target: Target) -> Iterator[Link]:
    core = ProviderCore(0, target)
    try:
        yield DirectLink(core)
    finally:
        core.close()


@pytest.fixture
def archive(tmp_path: Path) -> tuple[bytes, dict[bytes, tuple[Any, ...]]]:
    """An archive of a small target, and what was in it."""
    shutil.copytree(DATA / "v1", tmp_path / "v1")
    with owned(tmp_path / "v1" / "file") as link:
        out = io.BytesIO()
        export(link, out, copying=False)
        return out.getvalue(), everything(link)


# There and back


@pytest.mark.parametrize(("source", "into"), [("file", "pmem"), ("pmem", "file")])
def test_a_target_comes_back_as_it_was(tmp_path: Path, source: str, into: str) -> None:
    path, tar, fresh = (tmp_path / name for name in ("target", "out.tar", "fresh"))
    with open_target(source, path) as target:
        fill(target)
    assert ok("export", path, tar) == b""
    assert not (tmp_path / "out.tar.part").exists()
    options = ["--pmem-size", str(1 << 30)] if into == "pmem" else []
    assert ok("import", *options, tar, fresh) == b""
    with owned(path) as old, owned(fresh) as new:
        before, after = everything(old), everything(new)
        assert after == before
        assert len(after) > 15
    assert ok("fsck", fresh) == f"{fresh}: 0 problems, 0 corrected\n".encode()
    with open_target(into, fresh, checksums=None) as target:
        names = target.namespace
        assert names.resolve("/hard").ino == names.resolve(f"/dir/below {'x' * 200}/big").ino
        assert target.create(1) not in [entry.region for entry, _, _ in before.values()]


def test_served_targets_through_a_pipe(tmp_path: Path) -> None:
    """From one provider to another, with copies of the regions, and IDs restored."""
    configs = [file_config(tmp_path / "a"), MEMORY, pmem_config(tmp_path / "c")]
    with open_target("file", tmp_path / "a", checksums=False) as target:
        fill(target)
    with provider_process("na+sm", *configs) as process:
        for provider_id in ("2", "3"):
            data = ok("export", "-p", str(int(provider_id) - 1), process.address, "-")
            assert ok("import", "-p", provider_id, "-", process.address, stdin=data) == b""
        with (
            served(process.address, 1) as a,
            served(process.address, 2) as b,
            served(process.address, 3) as c,
        ):
            assert everything(a) == everything(b) == everything(c)
            # Neither copies nor listings stay.
            counts = [link.call("room")[2] for link in (a, b, c)]
            assert counts[0] == len(
                {e.row.ino for e, _, _ in everything(a).values() if e.is_region}
            )
            assert len(set(counts)) == 1


def test_plain_tar_extracts_it(tmp_path: Path) -> None:
    with open_target("file", tmp_path / "target") as target:
        fill(target)
        nameless = target.list()[-2].hex()
    ok("export", tmp_path / "target", tmp_path / "out.tar")
    (tmp_path / "files").mkdir()
    command = ["tar", "--warning=no-unknown-keyword", "--xattrs", "--numeric-owner", "-xpf"]
    subprocess.run(
        [*command, str(tmp_path / "out.tar"), "-C", str(tmp_path / "files")],
        check=True, timeout=PATIENCE, capture_output=True,
    )  # fmt: skip
    files = tmp_path / "files"
    below = files / "dir" / f"below {'x' * 200}"
    assert (below / "big").read_bytes() == pattern(9 * MiB)
    assert (below / "big").samefile(files / "hard")
    assert (below / "big").stat().st_mtime_ns == 1_234_567_890_123_456_789
    assert (below / "big").stat().st_gid == 2**31
    assert (below / os.fsdecode(b"\xff\xfe not text")).read_bytes() == pattern(512)
    assert (files / "dir").stat().st_mode == 0o42751
    assert os.readlink(files / "dir" / "link") == "../hard"
    for name, offsets in SPARSE.items():
        expected = bytearray(HOLES)
        for offset in offsets:
            expected[offset : offset + 5000] = pattern(5000)
        assert (sparse := files / "dir" / os.fsdecode(name)).read_bytes() == expected
        assert sparse.stat().st_blocks * 512 < MiB
    assert (files / nameless).read_bytes() == pattern(70_000, 1)
    assert stat.S_ISCHR((files / f"special {stat.S_IFCHR}").stat().st_mode)
    assert os.getxattr(files / "hard", "user.bytes") == bytes(range(256))


def test_into_a_target_that_has_regions(tmp_path: Path, archive: Any) -> None:
    data, before = archive
    fresh = tmp_path / "fresh"
    ok("import", "-", fresh, stdin=data)
    assert "of this target is in use by that region" in fails("import", "-", fresh, stdin=data)
    text = fails("import", "--new-ids", "-", fresh, stdin=data)
    assert "the name exists in the target" in text
    with owned(fresh) as link:
        assert everything(link) == before
    with open_target("file", tmp_path / "other", checksums=False) as target:
        kept = target.create_and_write(b"kept")
        target.namespace.mkdir(1, b"results", 0o700, 1, 1)  # a directory takes more entries
    assert "is in use by another inode" in fails("import", "-", tmp_path / "other", stdin=data)
    ok("import", "--new-ids", "-", tmp_path / "other", stdin=data)
    with owned(tmp_path / "other") as link:
        found = everything(link)
        assert found.pop(kept.hex().encode())[2] == b"kept"
        assert found[b"results"][0].row.mode == stat.S_IFDIR | 0o700
        for path in (b"", b"results"):
            assert path in found
            del found[path], before[path]
        assert without_ids(found) == without_ids(before)


# Archives that are not what they should be


def refuse(target: Target, data: bytes, kind: type[Exception] = errors.BadArchive) -> str:
    """The message of an import that fails and leaves no trace."""
    held = DirectLink(ProviderCore(0, target))
    before = everything(held)
    with pytest.raises(kind) as caught:
        restore(held, io.BytesIO(data))
    for inode in [i for i in target._catalogue._cache.values() if i.pins]:
        target.namespace.unpin(inode.ino)  # as the end of a connection does
    assert everything(held) == before
    return str(caught.value)


def test_archives_that_are_cut_off(tmp_path: Path, archive: Any) -> None:
    data, before = archive
    end = data.rindex(b"The end of an archive")
    points = [*range(0, 2048, 511), *range(2048, len(data), 1777), end, end + 50]
    with open_target("file", tmp_path / "target") as target:
        for size in points:
            if size < end + 100:
                refuse(target, data[:size])
        assert target.list() == []
        # After its last word nothing is missed.
        assert (
            restore(DirectLink(ProviderCore(0, target)), io.BytesIO(data[: end + 512]))
            == len(before) - 1
        )


@pytest.mark.parametrize("kind", ["empty", "short", "text", "random", "compressed", "zip"])
def test_a_file_that_is_no_tar_archive(kind: str, archive: Any) -> None:
    zipped = io.BytesIO()
    with zipfile.ZipFile(zipped, "w") as file:
        file.writestr("name", b"data")
    data = {
        "empty": b"", "short": b"x" * 100, "text": b"no archive\n" * 1000,
        "random": random.Random(1).randbytes(5000), "compressed": gzip.compress(archive[0]),
        "zip": zipped.getvalue(),
    }[kind]  # fmt: skip
    with open_memory(MemoryConfig()) as target:
        message = refuse(target, data)
    assert message.startswith("not a tar archive, or its first header is damaged (")
    assert message.endswith("; if it is compressed, decompress it first")


def test_damaged_archives(archive: Any) -> None:
    data, before = archive
    dice = random.Random(1)
    refused = 0
    for _ in range(200):
        place = dice.randrange(len(data))
        spoiled = bytearray(data)
        spoiled[place] ^= 1 << dice.randrange(8)
        target = open_memory(MemoryConfig())
        with link_to(target) as link:
            try:
                restore(link, io.BytesIO(spoiled))
            except errors.BadArchive:
                refused += 1
                assert target.namespace.readdir(1) == []
                continue
            assert everything(link) == before  # padding, or what plain tar alone looks at
    assert refused > 50


def test_a_tar_file_that_is_no_archive_of_a_target(tmp_path: Path, archive: Any) -> None:
    plain = io.BytesIO()
    with tarfile.open(fileobj=plain, mode="w") as tar:
        tar.addfile(tarfile.TarInfo("file"))
    whole = archive[0]
    end = whole.rindex(b"././@PaxHeader")
    with open_target("file", tmp_path / "target") as target:
        for data in (b"", b"text" * 1000, plain.getvalue(), bytes(10_240)):
            refuse(target, data)
        assert "format 99" in refuse(target, whole.replace(b'"format": 3', b'"format":99'))
        assert "its end record is missing" in refuse(target, whole[:end] + bytes(1024))
    assert "expected" not in fails("import", "-", tmp_path / "fresh", stdin=b"nothing")
    assert not (tmp_path / "fresh").exists()


def craft(target: Target, *entries: ArchiveEntry) -> int:
    """Have *entries* grafted as a client may ask for it."""
    link = DirectLink(ProviderCore(0, target))
    place = link.call("adopt", RegionID(), 0)
    data = b"".join(entry.pack() for entry in entries)
    link.write(place.region, 0, memoryview(data), False, True)
    try:
        return int(link.call("graft", place.region))
    finally:
        link.call("unpin", place.ino, 1)


def test_an_entry_of_an_older_version_has_no_time_of_birth() -> None:
    row = Row(5, 5, stat.S_IFIFO | 0o600, 1, 0, 0, 0, 0, 1, 2, 3, 0, None, 4, IMMUTABLE)
    entry = ArchiveEntry(b"x", row, [(b"user.x", b"1")])
    assert unpack(entry.pack()) == entry
    older = msgpack.packb(msgpack.unpackb(entry.pack())[:-2])
    assert unpack(older) == entry.changed(btime=0, flags=0)


@pytest.mark.parametrize("late", [False, True])
def test_nothing_is_imported_into_an_immutable_directory(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, late: bool
) -> None:
    """Also if it becomes immutable while names are staged."""
    row = Row(5, 5, stat.S_IFIFO | 0o600, 1, 0, 0, 0, 0, 0, 0, 0, 0, None)
    above = ArchiveEntry(b"dir", row._replace(ino=6, mode=stat.S_IFDIR | 0o755, nlink=2), [])
    entries = (ArchiveEntry(b"", above.row, []), above, ArchiveEntry(b"dir/x", row, []))
    with open_target("file", tmp_path / "target") as target:
        directory = target.namespace.mkdir(1, b"dir", 0o755, 0, 0).ino
        joining = _Graft._join

        def join(graft: _Graft, empty: bool) -> None:
            target.namespace.get(directory).flags = IMMUTABLE  # the lock is held
            joining(graft, empty)

        if late:
            monkeypatch.setattr(_Graft, "_join", join)
        else:
            target.set_flags(directory, IMMUTABLE)
        with pytest.raises(PermissionError, match="immutable"):
            craft(target, *entries)
        assert target.state.catalogue.entries(directory, b"", 10) == []
        assert not target.state.catalogue.staging


def test_invalid_entries(tmp_path: Path) -> None:
    """Whoever can write to a target can send any; the tree stays as it was."""
    good = ArchiveEntry(b"x", Row(5, 5, stat.S_IFIFO | 0o600, 1, 0, 0, 0, 0, 0, 0, 0, 0, None), [])
    root = good._replace(path=b"").changed(mode=stat.S_IFDIR | 0o755)
    with open_target("file", tmp_path / "target") as target:
        target.namespace.mknod(1, b"there", 0o600, 0, 0)
        link = DirectLink(ProviderCore(0, target))
        before = everything(link)
        for bad in (
            good._replace(path=b"a/b"),
            good._replace(path=b"/a"),
            good._replace(path=b".."),
            good._replace(path=b"a\0b"),
            good._replace(path=b"n" * 256),
            good._replace(path=b"there"),
            good._replace(path=b"x"),  # once more
            good._replace(path=b"there/x"),
            good.changed(mode=0),
            good.changed(mode=stat.S_IFLNK | 0o777),
            good.changed(mode=stat.S_IFLNK | 0o777, target=b"t" * 5000),
            good.changed(mode=stat.S_IFREG | 0o600),  # of no region that was adopted
            good.changed(mode=stat.S_IFREG | 0o600, ino=2),
            good.changed(ino=-1),
            good.changed(mtime=1 << 63),
            good._replace(xattrs=[(b"system.x", b"")]),
        ):
            with pytest.raises((errors.BadArchive, errors.PathError)):
                craft(target, root, good, bad)
            assert everything(link) == before, bad
        for garbage in (b"\xc1", b"\x93\x01\x02\x03", b"\xdd\xff\xff\xff\xff", good.pack()[:-3]):
            region = target.create_and_write(garbage)
            with contextlib.suppress(errors.BadArchive):
                link.call("graft", region)
            target.erase(region)
            assert everything(link) == before
        assert craft(target, root, good) == 1


# While clients write


def test_an_export_has_regions_of_one_instant(tmp_path: Path) -> None:
    """Regions that are overwritten as a whole all the time are never seen half new."""
    size = 1 << 20
    config = file_config(tmp_path / "target")
    with provider_process("na+sm", config) as process, served(process.address, 1) as link:
        regions = [link.create_and_write(memoryview(bytes(size)), False) for _ in range(4)]
        stop = threading.Event()

        def write() -> None:
            with served(process.address, 1) as mine:
                number = 0
                while not stop.is_set():
                    number = (number + 1) % 256
                    for region in regions:
                        mine.write(region, 0, memoryview(bytes([number]) * size), False, False)

        writer = threading.Thread(target=write)
        writer.start()
        try:
            for _ in range(5):
                out = io.BytesIO()
                export(link, out, copying=True)
                seen = set()
                out.seek(0)
                with tarfile.open(fileobj=out) as tar:
                    for member in tar:
                        if len(member.name) == 32:
                            content = tar.extractfile(member)
                            assert content is not None
                            data = content.read()
                            assert data == data[:1] * size
                            seen.add(member.name)
                assert seen == {region.hex() for region in regions}
        finally:
            stop.set()
            writer.join()


def test_an_export_has_names_of_one_instant(tmp_path: Path) -> None:
    """What moves all the time is in an archive once; what is erased after it began is there."""
    with open_target("file", tmp_path / "target") as target:
        names = target.namespace
        directories = [names.mkdir(1, b"%d" % i, 0o755, 0, 0).ino for i in range(30)]
        for ino in directories:
            for i in range(30):
                names.mknod(ino, b"%d" % i, 0o600, 0, 0)
        moving = names.mknod(directories[0], b"moving", 0o600, 0, 0)
        stop = threading.Event()

        def move() -> None:
            here = 0
            while not stop.is_set():
                there = (here * 7 + 11) % 30
                if there != here:
                    names.rename(directories[here], b"moving", directories[there], b"moving")
                here = there

        mover = threading.Thread(target=move)
        mover.start()
        try:
            for _ in range(10):
                found = everything(DirectLink(ProviderCore(0, target)))
                assert sum(path.endswith(b"/moving") for path in found) == 1
                assert len(found) == 1 + 30 + 900 + 1
        finally:
            stop.set()
            mover.join()
        assert moving.region in target.list(limit=10_000)


@pytest.mark.parametrize("kind", ["file", "memory"])
def test_what_is_erased_meanwhile_is_kept_for_the_export(tmp_path: Path, kind: str) -> None:
    memory = kind == "memory"
    target = open_memory(MemoryConfig()) if memory else open_target(kind, tmp_path / "t")
    with link_to(target) as link:
        data = pattern(100_000)
        gone = [target.create_and_write(data) for _ in range(3)]
        file = target.namespace.mknod(1, b"name", 0o600, 0, 0).region
        target.write(file, 0, data, extend=True)
        listing = link.call("survey")
        target.resize(gone[1], 5)
        for region in gone:
            target.erase(region)
        target.namespace.unlink_name("/name")
        target.commit()
        for region, content in zip([*gone, file], [data, data[:5], data, data], strict=True):
            with pytest.raises(errors.InvalidRegion):
                target.size(region)
            copy = link.call("copy", region)
            assert target.read(copy.region, 0, copy.size) == content
            link.call("unpin", copy.ino, 1)
        link.call("unpin", listing.ino, 1)
        target.commit()
        with pytest.raises(errors.InvalidRegion):
            link.call("copy", gone[0])
        assert target.list() == []
        assert list(target._storage.scan()) == []


@pytest.mark.parametrize("refused", [None, errno.EOPNOTSUPP])
def test_copies_keep_holes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, refused: int | None
) -> None:
    """Also where the kernel copies nothing from file to file."""

    def refuse_copies(*arguments: Any) -> int:
        raise OSError(refused, "not here")

    if refused is not None:
        monkeypatch.setattr(os, "copy_file_range", refuse_copies)
    target = open_target("file", tmp_path / "target", checksums=False)
    with link_to(target) as link:
        region = target.create(1 << 33)
        for offset in (0, 5 * MiB + 1, (1 << 33) - 3):
            target.write(region, offset, b"xyz")
        copy = link.call("copy", region)
        assert copy.size == 1 << 33
        for offset in (0, 5 * MiB + 1, (1 << 33) - 3):
            assert target.read(copy.region, offset, 3) == b"xyz"
        assert target.read(copy.region, 4 * MiB, MiB) == bytes(MiB)
        file = region_file(tmp_path / "target", copy.region)
        assert file.stat().st_blocks < 1000


def opened(kind: str, path: Path) -> Target:
    if kind == "memory":
        return open_memory(MemoryConfig())
    return open_target("file", path, checksums=kind == "checksummed")


@pytest.mark.parametrize(
    ("kind", "copying"), [("memory", False), ("file", True), ("checksummed", True)]
)
def test_archives_keep_holes(tmp_path: Path, kind: str, copying: bool) -> None:
    """They take neither time nor space, in the archive and where it is imported.

    Of regions that are larger than the file system, one of them with many extents.
    """
    size, data = 1 << 40, pattern(MiB)
    islands = range(0, size, size // (4200 if kind == "memory" else 42) & -4096)
    archive = io.BytesIO()
    with opened(kind, tmp_path / "target") as target, link_to(target) as link:
        large, scattered = target.create(1), target.create(1)
        for region in large, scattered:
            target.resize(region, size)
        for offset in (0, size // 2, size - MiB):
            target.write(large, offset, data)
        for offset in islands:
            target.write(scattered, offset, b"%16d" % offset)
        export(link, archive, copying=copying)
    assert len(archive.getvalue()) < 4 * MiB + len(islands) * 4200
    archive.seek(0)
    with opened(kind, tmp_path / "fresh") as target, link_to(target) as link:
        restore(link, archive)
        for offset in (0, size // 2, size - MiB):
            assert target.read(large, offset, MiB) == data
        assert target.read(large, MiB, MiB) == bytes(MiB)
        for offset in islands:
            assert target.read(scattered, offset, 16) == b"%16d" % offset
        for region, most in ((large, 5 * MiB), (scattered, 2 * 4096 * len(islands))):
            found = link.call("getattr", region.slot)
            assert found.size == size
            assert found.space < most


def sparse_archive(tmp_path: Path) -> bytes:
    with open_target("file", tmp_path / "target", checksums=False) as target:
        target.write(target.create(MiB), 500_000, b"data")
        out = io.BytesIO()
        with link_to(target) as link:
            export(link, out, copying=False)
        return out.getvalue()


def test_damaged_lists_of_extents(tmp_path: Path) -> None:
    whole = sparse_archive(tmp_path)
    start = whole.index(b"2\n499712\n4096\n1048576\n0\n")
    with open_target("file", tmp_path / "into") as target:
        for text in (
            b"2\n499712\n4096\n1048577\n0\n", b"2\n499712\n4096\n0499712\n0\n",
            b"2\n-99712\n4096\n1048576\n0\n", b"2\n499712\n-096\n1048576\n0\n",
            b"2\n499712\n4096\n1048576\nx\n", b"9\n499712\n4096\n1048576\n0\n",
            b"2\n499713\n4096\n1048576\n0\n", b"x\n499712\n4096\n1048576\n0\n",
        ):  # fmt: skip
            refuse(target, whole[:start] + text + whole[start + len(text) :])
        for end in (start + 5, start + 512, start + 600):  # tarfile would read for ever
            assert "truncated" in refuse(target, whole[:end])


def test_an_exporter_that_is_killed_leaves_nothing(tmp_path: Path) -> None:
    with (
        provider_process("na+sm", file_config(tmp_path / "target")) as process,
        served(process.address, 1) as link,
    ):
        for i in range(3):
            link.create_and_write(memoryview(pattern(16 * MiB, i)), False)
        with subprocess.Popen(
            [*COMMAND, "export", "-p", "1", process.address, "-"],
            env=environment(), stdout=subprocess.PIPE, stdin=subprocess.DEVNULL,
        ) as exporter:  # fmt: skip
            assert exporter.stdout is not None
            exporter.stdout.read(20 * MiB)
            exporter.kill()
        eventually(lambda: link.call("room")[2] == 3)
        link.call("commit")
        files = Path(f"{tmp_path}/target.regions")
        eventually(lambda: sum(len(p.name) == 32 for p in files.rglob("*")) == 3)


def start_import(data: Path, *arguments: str) -> subprocess.Popen[bytes]:
    process = subprocess.Popen(
        [*COMMAND, "import", *arguments[:-1], "-", arguments[-1]],
        env=environment(), stdin=subprocess.PIPE,
    )  # fmt: skip
    assert process.stdin is not None
    whole = data.read_bytes()
    process.stdin.write(whole[: len(whole) * 3 // 4])
    process.stdin.flush()
    return process


@pytest.fixture
def large_archive(tmp_path: Path) -> Path:
    with open_target("file", tmp_path / "source") as target:
        for i in range(4):
            region = target.create_and_write(pattern(4 * MiB, i))
            target.namespace.link_name(region, f"/{i}")
    ok("export", tmp_path / "source", tmp_path / "out.tar")
    return tmp_path / "out.tar"


def kill(process: subprocess.Popen[bytes]) -> None:
    process.kill()
    assert process.stdin is not None
    with contextlib.suppress(BrokenPipeError):
        process.stdin.close()
    assert process.wait(PATIENCE) == -signal.SIGKILL


def test_an_importer_that_is_killed_leaves_nothing(tmp_path: Path, large_archive: Path) -> None:
    with (
        provider_process("na+sm", file_config(tmp_path / "target")) as process,
        served(process.address, 1) as link,
    ):
        mine = link.create_and_write(memoryview(b"mine"), False)
        importer = start_import(large_archive, "--new-ids", "-p", "1", process.address)
        eventually(lambda: link.call("room")[2] > 2)
        assert [name for name, _ in link.call("readdir", 1, b"", 100)] == [mine.hex().encode()]
        kill(importer)
        eventually(lambda: link.call("list", RegionID(), 10) == [mine])
    path = tmp_path / "fresh"
    importer = start_import(large_archive, str(path))
    regions = Path(f"{path}.regions")
    eventually(lambda: sum(len(p.name) == 32 for p in regions.rglob("*")) > 1)
    kill(importer)
    with open_target("file", path, checksums=False) as target:
        assert target.list() == []
        assert target.namespace.readdir(1) == []
    ok("import", large_archive, path)
    assert ok("fsck", path).endswith(b": 0 problems, 0 corrected\n")


def test_a_provider_that_is_killed_during_an_import(tmp_path: Path, large_archive: Path) -> None:
    path = tmp_path / "target"
    with provider_process("na+sm", file_config(path)) as process:
        importer = start_import(large_archive, "-p", "1", process.address)
        with served(process.address, 1) as link:
            eventually(lambda: link.call("room")[2] > 2)
            link.call("commit")
        process.kill()
        assert importer.stdin is not None
        with contextlib.suppress(BrokenPipeError):
            importer.stdin.write(large_archive.read_bytes()[-5 * MiB :])
        with contextlib.suppress(BrokenPipeError):
            importer.stdin.close()
        assert importer.wait(PATIENCE) == 1
    with open_target("file", path, checksums=False) as target:
        assert target.list() == []


# Limits


def test_memory_is_bounded(tmp_path: Path) -> None:
    """An archive of 300 MiB needs no more memory than a small one does, there and back."""
    with open_target("file", tmp_path / "target", checksums=False) as target:
        region = target.create(300 * MiB)
        target.write(region, 299 * MiB, b"the end")
    script = """
import sys
from warabi.tools.cli.main import main
try:
    main(sys.argv[1:])
finally:  # not getrusage(), which counts what the parent had before this program began
    with open("/proc/self/status") as file:
        status = file.read()
    print(int(status.split("VmHWM:")[1].split()[0]) // 1024, file=sys.stderr)
"""
    command = [sys.executable, "-c", script]
    with (
        subprocess.Popen([*command, "export", str(tmp_path / "target"), "-"], env=environment(),
                         stdout=subprocess.PIPE, stderr=subprocess.PIPE) as exporter,
        subprocess.Popen([*command, "import", "-", str(tmp_path / "new")], env=environment(),
                         stdin=exporter.stdout, stderr=subprocess.PIPE) as importer,
    ):  # fmt: skip
        assert exporter.stdout is not None
        exporter.stdout.close()
        used = [int(process.communicate(timeout=PATIENCE)[1]) for process in (exporter, importer)]
    assert max(used) < 200
    with open_target("file", tmp_path / "new", checksums=False) as target:
        assert target.read(region, 299 * MiB, 7) == b"the end"


def test_errors_of_the_commands(tmp_path: Path) -> None:
    fails("export", tmp_path / "missing", tmp_path / "out.tar")
    assert os.listdir(tmp_path) == []
    with open_target("file", tmp_path / "target") as target:
        target.create(10)
        assert "already open" in fails("export", tmp_path / "target", tmp_path / "out.tar")
        assert "already open" in fails("import", "-", tmp_path / "target")
    with open("/dev/full", "wb") as full:
        done = subprocess.run(
            [*COMMAND, "export", str(tmp_path / "target"), "-"], stdout=full,
            stderr=subprocess.PIPE, env=environment(), timeout=PATIENCE, check=False,
        )  # fmt: skip
    assert done.returncode == 1
    assert b"No space left" in done.stderr
    assert run("export", tmp_path / "target", tmp_path / "no" / "such.tar").returncode == 1


def test_a_full_target_takes_nothing(tmp_path: Path, large_archive: Path) -> None:
    path = tmp_path / "small"
    text = fails("import", "--pmem-size", str(10 * MiB), large_archive, path)
    assert "do not fit" in text
    assert not path.exists()
    assert not Path(f"{path}.regions").exists()
