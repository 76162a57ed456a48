"""Values outside their domains: refused or clamped, and no trouble to a target afterwards."""

from __future__ import annotations

import ast
import contextlib
import errno
import io
import itertools
import stat
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import hypothesis.strategies as st
import pytest
from hypothesis import given, settings

import warabi
from tests.maintenance.test_fsck import edit, fsck
from tests.storage.test_checksums import open_target
from tests.support.helpers import MEMORY, file_config, open_memory
from warabi import errors
from warabi._core.attributes import Attributes
from warabi.backends.memory_budget import MemoryBudget
from warabi.client import Client, TargetHandle
from warabi.engine import Engine, client
from warabi.errors import PathError
from warabi.in_process.link import DirectLink
from warabi.metadata import acl, domain
from warabi.protocol import forms
from warabi.protocol.operations import OPERATIONS, Payload, Served
from warabi.provider.core import ProviderCore
from warabi.provider.migration.records import join_rows, pack_row, rows
from warabi.region import RegionID
from warabi.server import Provider
from warabi.target.config import MemoryConfig
from warabi.target.entries import ArchiveEntry, unpack_all
from warabi.target.graft import adopt
from warabi.tools.archive.export import export
from warabi.tools.archive.restore import restore
from warabifs.frontends.kernel.dispatch import _packed

FAR = (1 << 62) - 1
EDGES = sorted({sign * ((1 << bits) + more) for bits in (0, 8, 12, 16, 31, 32, 61, 62, 63, 64, 70)
                for more in (-2, -1, 0, 1) for sign in (1, -1)})  # fmt: skip
FEW = [-1 << 70, -1 << 63, -1 << 32, -1, 0o170000, 1 << 16, (1 << 32) - 1, 1 << 32, 1 << 62,
       (1 << 63) - 1, (1 << 64) - 1, 1 << 70]  # fmt: skip
INTEGERS = st.one_of(st.sampled_from(EDGES), st.integers(-5, 300), st.integers(-1 << 70, 1 << 70))
INOS = st.one_of(st.sampled_from([1, 2, 3, 4, 5]), st.sampled_from([1, 2, 3, 4, 5]), INTEGERS)
ODD_BYTES = [
        b"", b".", b"..", b"/", b"a/b", b"a\0b", b"\0", b"f", b"d", b"g", b"\xff" * 255, b"x" * 256,
        b"x" * 4095, b"x" * 4096, b"user.", b"user.a", b"user.\0", b"user." + b"x" * 250,
        b"user." + b"x" * 251, b"trusted.a", b"system.a", acl.ACCESS, acl.DEFAULT,
        acl.pack([acl.AclEntry(1, 7, 0)]), b"y" * (64 * 1024), b"y" * (64 * 1024 + 1),
    ]  # fmt: skip
NAMES = st.one_of(st.sampled_from(ODD_BYTES), st.binary(max_size=20))
ODD_PATHS = ["", "/", "/f", "/d/x", "/a\0b", "\ud800", "/\udcff", "/" + "x" * 256, "/x" * 40000]
PATHS = st.one_of(st.sampled_from(ODD_PATHS), st.text(max_size=20))
PARTS = (0, 1, 2, 3, FAR, FAR + 1, (1 << 63) - 2, (1 << 63) - 1, 1 << 63, (1 << 64) - 1)
ODD_IDS = [RegionID.from_parts(*parts) for parts in itertools.product(PARTS, PARTS)]
IDS = st.sampled_from(ODD_IDS)
BY_FORM = {
    id(forms.FLAG): st.booleans(),
    id(forms.BYTES): NAMES,
    id(forms.TEXT): PATHS,
    id(forms.INTEGER): INTEGERS,
    id(forms.OPTIONAL_INTEGER): st.none() | INTEGERS,
    id(forms.REGION): st.just("a region") | IDS,
}
ODD: dict[int, list[Any]] = {
    id(forms.FLAG): [False, True],
    id(forms.BYTES): ODD_BYTES,
    id(forms.TEXT): ODD_PATHS,
    id(forms.INTEGER): FEW,
    id(forms.OPTIONAL_INTEGER): [None, *FEW],
    id(forms.REGION): ODD_IDS,
}
TABLE = {
    name: operation
    for name, operation in OPERATIONS.items()
    if operation.served is Served.TARGET and operation.payload is Payload.NONE
}
"""What is called by name, with nothing but values."""
LONG = {"copy", "update", "verify", "sync"}
"""What reads all bytes of a region, which has too many of them once it was resized."""


USUAL: dict[str, st.SearchStrategy[Any]] = {
    "ino": st.sampled_from([1, 2, 3, 4]), "parent": st.sampled_from([1, 3]),
    "new_parent": st.sampled_from([1, 3]), "name": st.sampled_from([b"a", b"b", b"f", b"user.a"]),
    "new_name": st.sampled_from([b"a", b"b", b"f"]), "mode": st.sampled_from([0o100644, 0o20644]),
    "uid": st.just(0), "gid": st.just(0), "rdev": st.just(0), "umask": st.just(0o22),
    "flags": st.sampled_from([0, 1, 2, 4]), "size": st.integers(0, 100),
    "path": st.sampled_from(["/a", "/f", "/d/b"]), "target": st.just(b"f"), "count": st.just(1),
    "region": st.just("a region"), "limit": st.just(100),
}  # fmt: skip
VALID: dict[str, Any] = {
    "ino": 2, "parent": 1, "new_parent": 3, "mode": 0o100644, "uid": 0, "gid": 0, "rdev": 0,
    "umask": 0o22, "flags": 0, "size": 10, "target": b"t", "count": 0, "limit": 100, "first": 0,
    "atime_ns": 0, "mtime_ns": 0, "value": b"v", "after": b"", "extents": b"",
}  # fmt: skip
"""What goes with one odd argument; names are new ones, but of what is to be there already."""
MAKES = {"mknod", "mkdir", "symlink", "link", "link_name"}


def arguments(name: str) -> st.SearchStrategy[list[Any]]:
    """All as usual but one, or any at all."""
    forms_of = TABLE[name].arguments
    odd = {
        argument: INOS if argument in ("ino", "parent", "new_parent") else BY_FORM[id(form)]
        for argument, form in forms_of.items()
    }
    usual = {argument: USUAL.get(argument, odd[argument]) for argument in forms_of}
    ways = [{**usual, argument: odd[argument]} for argument in forms_of]
    return st.one_of([st.tuples(*way.values()).map(list) for way in [usual, *ways, odd]])


STEPS = st.lists(
    st.sampled_from(sorted(TABLE)).flatmap(lambda name: st.tuples(st.just(name), arguments(name))),
    min_size=1, max_size=12,
)  # fmt: skip


@pytest.fixture(autouse=True)
def little_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    """Have targets in memory refuse what would fill the machine's, as sizes to allocate would."""
    original = MemoryBudget.__init__

    def limited(self: MemoryBudget, limit: int | None, *rest: Any) -> None:
        original(self, 1 << 28 if limit is None else limit, *rest)

    monkeypatch.setattr(MemoryBudget, "__init__", limited)


@contextlib.contextmanager
def _reached(way: str) -> Iterator[tuple[Engine, Engine]]:
    """The engines of a provider and of its client."""
    with Engine("tcp" if way == "tcp" else "na+sm") as engine:
        if way == "direct":
            yield engine, engine
        else:
            with Engine("tcp" if way == "tcp" else "na+sm", client) as other:
                yield engine, other


def call(handle: TargetHandle, name: str, *values: Any) -> Any:
    return handle._link.call(name, *values)


def listed(handle: TargetHandle) -> dict[int, Attributes]:
    """Every inode, as ``ls -R`` finds them, in the form in which the kernel gets them."""
    found, pending = {}, [1]
    while pending:
        parent, after = pending.pop(), b""
        while page := call(handle, "readdir", parent, after, 1000):
            after = page[-1][0]
            for name, attributes in page:
                assert call(handle, "lookup", parent, name) == attributes
                _packed(attributes)
                found[attributes.ino] = attributes
                assert stat.S_IFMT(attributes.mode) in domain.KINDS
                if stat.S_ISDIR(attributes.mode):
                    pending.append(attributes.ino)
                if stat.S_ISLNK(attributes.mode):
                    assert b"\0" not in call(handle, "readlink", attributes.ino)
                for xattr in call(handle, "listxattr", attributes.ino):
                    call(handle, "getxattr", attributes.ino, xattr)
    return found


def check_whole(handle: TargetHandle) -> None:
    """A target works: it commits, lists, and tells an export of everything."""
    call(handle, "commit")
    listed(handle)
    call(handle, "used")
    survey = call(handle, "survey")
    content = handle.read(survey.region, 0, survey.size)
    call(handle, "unpin", survey.ino, 1)
    assert list(unpack_all(io.BytesIO(content)))
    handle.create_and_write(b"still there", persist=True)


def furnish(handle: TargetHandle, prefix: bytes = b"") -> tuple[RegionID, RegionID]:
    """Make a region ``f``, a directory ``d``, a link ``s`` and a region ``d/g``; the regions."""
    region = call(handle, "mknod", 1, prefix + b"f", 0o644, 0, 0, 0, False, 0).region
    directory = call(handle, "mkdir", 1, prefix + b"d", 0o755, 0, 0, 0).ino
    call(handle, "symlink", 1, prefix + b"s", b"f", 0, 0)
    return region, call(handle, "mknod", directory, b"g", 0o644, 0, 0, 0, False, 0).region


def attempt(handle: TargetHandle, name: str, values: list[Any]) -> None:
    """Call an operation, which may fail by an error that says whose fault it is."""
    try:
        call(handle, name, *values)
    except (errors.ProviderFailed, errors.CorruptTarget) as error:
        pytest.fail(f"{name} {values}: {error!r}")
    except errors.Exception:
        pass


def handle_regions(handle: TargetHandle) -> list[RegionID]:
    found: list[RegionID] = call(handle, "list", RegionID(), 1000)
    return found


@pytest.mark.parametrize(
    ("way", "kind"),
    [("direct", "memory"), ("direct", "file"), ("na+sm", "file"), ("tcp", "memory")],
)
def test_no_value_harms_a_target(
    way: str, kind: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    numbers = itertools.count(1)

    @settings(max_examples=20, deadline=None)
    @given(steps=STEPS)
    def run(engine: Engine, other: Engine, steps: list[tuple[str, list[Any]]]) -> None:
        number = next(numbers)
        path = tmp_path / f"target{number}"
        provider = Provider(engine, number, MEMORY if kind == "memory" else file_config(path))
        try:
            handle = Client(other).make_target_handle(str(engine.addr()), number)
            region, small = furnish(handle)
            for name, values in steps:
                own = small if name in LONG else region
                values = [own if value == "a region" else value for value in values]
                attempt(handle, name, values)
            check_whole(handle)
        finally:
            provider.close()
        if kind == "file":
            status, output = fsck(path)
            assert status == 0, output

    with _reached(way) as (engine, other):
        run(engine, other)
    assert "Traceback" not in caplog.text


@pytest.mark.parametrize(
    ("way", "kind"), [("direct", "memory"), ("direct", "file"), ("na+sm", "memory")]
)
def test_no_value_of_any_argument_harms_a_target(
    way: str, kind: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Each operation with each odd value of each argument, all others being as usual."""
    calls = 0
    with _reached(way) as (engine, other):
        for number, (name, operation) in enumerate(sorted(TABLE.items()), 1):
            path = tmp_path / name
            provider = Provider(engine, number, MEMORY if kind == "memory" else file_config(path))
            try:
                handle = Client(other).make_target_handle(str(engine.addr()), number)
                region, _ = furnish(handle)
                for odd, form in operation.arguments.items():
                    for value in ODD[id(form)]:
                        calls += 1
                        fresh = b"n%d" % calls
                        if name not in MAKES:
                            make = "mkdir" if name == "rmdir" else "mknod"
                            more = (0,) if name == "rmdir" else (0, False, 0)
                            call(handle, make, 1, fresh, 0o644, 0, 0, *more)
                        usual = {
                            **VALID,
                            "region": region, "listing": region,
                            "name": b"user.a" if "xattr" in name else fresh,
                            "new_name": fresh + b"new", "path": f"/{fresh.decode()}",
                            odd: value,
                        }  # fmt: skip
                        if name == "list":
                            usual["after"] = value if odd == "after" else region
                        values = [usual.get(argument, False) for argument in operation.arguments]
                        attempt(handle, name, values)
                    if region not in handle_regions(handle):
                        region, _ = furnish(handle, b"again%d" % calls)
                    check_whole(handle)
            finally:
                provider.close()
            if kind == "file":
                status, output = fsck(path)
                assert status == 0, output
    assert calls > 500
    assert "Traceback" not in caplog.text


REFUSED: list[tuple[str, tuple[Any, ...], int]] = [
    ("setattr", (2, None, -1, None, None, None), errno.EINVAL),
    ("setattr", (2, None, None, (1 << 32) - 1, None, None), errno.EINVAL),
    ("setattr", (2, None, 1 << 32, None, None, None), errno.EINVAL),
    ("setattr", (2, -1, None, None, None, None), errno.EINVAL),
    ("setattr", (2, 1 << 16, None, None, None, None), errno.EINVAL),
    ("mkdir", (1, b"x", 0o755, -1, 0, 0), errno.EINVAL),
    ("mkdir", (1, b"x", 0o755, 0, 1 << 32, 0), errno.EINVAL),
    ("mkdir", (1, b"x", 0o755, 0, 0, -1), errno.EINVAL),
    ("mkdir", (1, b"x", 0o755, 0, 0, 0o170000), errno.EINVAL),
    ("mkdir", (1, b"x", 1 << 40, 0, 0, 0), errno.EINVAL),
    ("mkdir", (1, b"", 0o755, 0, 0, 0), errno.EINVAL),
    ("mkdir", (1, b"a\0b", 0o755, 0, 0, 0), errno.EINVAL),
    ("mkdir", (1, b"x" * 256, 0o755, 0, 0, 0), errno.ENAMETOOLONG),
    ("mknod", (1, b"x", stat.S_IFCHR, 0, 0, 1 << 32, False, 0), errno.EINVAL),
    ("mknod", (1, b"x", stat.S_IFCHR, 0, 0, -1, False, 0), errno.EINVAL),
    ("mknod", (1, b"x", 0o644, 1 << 32, 0, 0, False, 0), errno.EINVAL),
    ("mknod", (1, b"x", 0o644, 0, -1, 0, False, 0), errno.EINVAL),
    ("mknod", (1, b"x", 1 << 40 | 0o644, 0, 0, 0, False, 0), errno.EINVAL),
    ("symlink", (1, b"x", b"a\0b", 0, 0), errno.EINVAL),
    ("symlink", (1, b"x", b"", 0, 0), errno.ENOENT),
    ("symlink", (1, b"x", b"t" * 4096, 0, 0), errno.ENAMETOOLONG),
    ("symlink", (1, b"x", b"t", 1 << 32, 0), errno.EINVAL),
    ("unpin", (2, -1), errno.EINVAL),
    ("setxattr", (2, b"user.", b"", True), errno.EINVAL),
    ("setxattr", (2, b"user.a\0b", b"", True), errno.EINVAL),
    ("setxattr", (2, b"user." + b"x" * 251, b"", True), errno.ERANGE),
    ("setxattr", (2, b"user.a", bytes((64 << 10) + 1), True), errno.E2BIG),
    ("setxattr", (2, b"system.a", b"", True), errno.EOPNOTSUPP),
    ("setxattr", (2, acl.ACCESS, acl.pack([
        acl.AclEntry(1, 7, 0), acl.AclEntry(2, 7, 0xFFFFFFFF), acl.AclEntry(4, 7, 0),
        acl.AclEntry(16, 7, 0), acl.AclEntry(32, 7, 0)]), True), errno.EINVAL),
    ("resolve", ("/\ud800",), errno.EINVAL),
]  # fmt: skip


@pytest.mark.parametrize("way", ["direct", "tcp"])
def test_what_is_refused(way: str) -> None:
    """With the errno of the system call, and nothing is changed."""
    with _reached(way) as (engine, other), Provider(engine, 1, MEMORY):
        handle = Client(other).make_target_handle(str(engine.addr()), 1)
        call(handle, "mknod", 1, b"f", 0o644, 0, 0, 0, False, 0)
        before = listed(handle)
        for name, values, number in REFUSED:
            with pytest.raises(errors.Exception) as caught:
                call(handle, name, *values)
            if isinstance(caught.value, PathError):
                assert caught.value.errno == number, (name, values)
            else:  # refused before the target is asked
                assert (way, name) in (("tcp", "unpin"), ("tcp", "resolve"))
        assert listed(handle) == before


@pytest.mark.parametrize("way", ["direct", "na+sm", "tcp"])
@pytest.mark.parametrize(
    ("asked", "stored"),
    [
        ((1 << 63) - 1, domain.TIME_MAX),
        (-(1 << 63), domain.TIME_MIN),
        (-(1 << 63) + 1, domain.TIME_MIN),
        (0, 0),
        (-1, -1),
    ],
)
def test_times_are_clamped(way: str, asked: int, stored: int) -> None:
    with _reached(way) as (engine, other), Provider(engine, 1, MEMORY):
        handle = Client(other).make_target_handle(str(engine.addr()), 1)
        call(handle, "mkdir", 1, b"d", 0o755, 0, 0, 0)
        changed = call(handle, "setattr", 2, None, None, None, asked, asked)
        assert (changed.atime_ns, changed.mtime_ns) == (stored, stored)


def test_times_beyond_64_bits_are_clamped_in_the_process() -> None:
    with open_memory(MemoryConfig()) as target:
        changed = target.namespace.setattr(1, atime_ns=1 << 80, mtime_ns=-(1 << 80))
        assert (changed.atime_ns, changed.mtime_ns) == (domain.TIME_MAX, domain.TIME_MIN)


def test_what_no_message_can_hold_is_said_before_it_is_sent() -> None:
    with _reached("tcp") as (engine, other), Provider(engine, 1, MEMORY):
        handle = Client(other).make_target_handle(str(engine.addr()), 1)
        for values in ((1, None, 1 << 70, None, None, None), (1, None, None, None, None, -1 << 70)):
            with pytest.raises(errors.ProtocolError, match="cannot be sent"):
                call(handle, "setattr", *values)
        with pytest.raises(errors.ProtocolError, match="cannot be sent"):
            call(handle, "create", 1 << 70)
        # Nothing was made, and nothing waits for an answer to undo it.
        assert not any(thread.name == "warabi-undo" for thread in threading.enumerate())
        assert call(handle, "getattr", 1).ino == 1  # the connection is still good


def test_every_id_that_is_given_can_be_imported(tmp_path: Path) -> None:
    """Also after an import of IDs near any bound: of this version, and of older ones."""
    for slot in (FAR - 1, FAR, FAR + 1, domain.SLOT_MAX - 1, domain.SLOT_MAX):
        path, copy = tmp_path / f"target{slot}", tmp_path / f"copy{slot}"
        wanted = RegionID.from_parts(slot, 7)
        with open_target("file", path, checksums=None) as target:
            adopt(target, wanted, 5)
            with target.state.guard.lock, target.state.guard.checked:
                names, catalogue = target.namespace, target._catalogue
                root, inode = catalogue.get(1), catalogue.region(wanted)
                assert root is not None
                assert inode is not None
                names._named(root, b"f", inode)
                inode.pins = 0
            made = [target.create(1) for _ in range(3)]
        with open_target("file", path, checksums=None) as target:  # counts on
            made += [target.create(1) for _ in range(3)]
            assert len({wanted, *made}) == 7
            archive = io.BytesIO()
            export(DirectLink(ProviderCore(0, target)), archive, copying=False)
        archive.seek(0)
        with open_target("file", copy, checksums=None) as target:
            restore(DirectLink(ProviderCore(0, target)), archive)
            assert sorted(target.regions()) == sorted([wanted, *made])
            target.create(1)
        assert fsck(path)[0] == fsck(copy)[0] == 0


@pytest.mark.parametrize(("slot", "generation"), [
    (0, 7), (1, 7), ((1 << 63) - 1, 7), (1 << 63, 7), (2, 1 << 63),
])  # fmt: skip
def test_invalid_ids_are_refused(slot: int, generation: int) -> None:
    with (
        open_memory(MemoryConfig()) as target,
        pytest.raises(errors.InvalidRegion, match="is not a valid region ID"),
    ):
        adopt(target, RegionID.from_parts(slot, generation), 0)


def test_an_archive_with_access_control_lists() -> None:
    value = acl.pack([
        acl.AclEntry(1, 7, 0), acl.AclEntry(2, 5, 1000), acl.AclEntry(4, 5, 0),
        acl.AclEntry(16, 7, 0), acl.AclEntry(32, 0, 0),
    ])  # fmt: skip
    archive = io.BytesIO()
    with open_memory(MemoryConfig()) as target:
        names = target.namespace
        names.mkdir(1, b"d", 0o755, 0, 0)
        names.setxattr(2, acl.DEFAULT, value)
        names.mknod(2, b"f", 0o644, 0, 0)
        names.setxattr(3, acl.ACCESS, value)
        export(DirectLink(ProviderCore(0, target)), archive, copying=False)
    archive.seek(0)
    with open_memory(MemoryConfig()) as target:
        restore(DirectLink(ProviderCore(0, target)), archive)
        names = target.namespace
        assert names.getxattr(names.resolve("/d").ino, acl.DEFAULT) == value
        assert names.getxattr(names.resolve("/d/f").ino, acl.ACCESS) == value


ENTRY = ArchiveEntry(b"f", domain.Row(2, 7, 0o100644, 1, 0, 0, 0, 0, 0, 0, 0, 0, None), [])
LINK = ENTRY.changed(mode=0o120777, size=1, target=b"t")
REFUSED_ROWS: list[dict[str, Any]] = [
    {"mode": 0o644}, {"size": -1}, {"generation": 1 << 63}, {"ino": 0}, {"ino": (1 << 63) - 1},
    {"target": b"t"}, {"mode": 0o120777, "size": 1},
]  # fmt: skip
BAD_ENTRIES: list[ArchiveEntry] = [
    *(ENTRY.changed(**bad) for bad in REFUSED_ROWS),
    ENTRY.changed(uid=1 << 32),
    ENTRY.changed(uid=-1, mode=0o106755),
    ENTRY.changed(gid=(1 << 32) - 1),
    ENTRY.changed(mode=1 << 32 | 0o100640),
    ENTRY.changed(rdev=1 << 32),
    ENTRY.changed(rdev=-1),
    ENTRY.changed(nlink=1 << 31),
    ENTRY.changed(nlink=-1),
    LINK.changed(size=2),
    LINK.changed(target=b"a\0b", size=3),
    LINK.changed(target=b"t" * 4096, size=4096),
]
ODD_XATTRS = [
    (b"user.", b""), (b"user.x", bytes(65537)), (b"system.x", b""), (b"user.\xff\n\0", b""),
    (acl.DEFAULT, b"no list"), (acl.ACCESS, b"no list"),
]  # fmt: skip


def _row(entry: ArchiveEntry) -> list[Any]:
    """The row of an inode in a migration."""
    return list(entry.row[:-1])


@pytest.mark.parametrize("entry", BAD_ENTRIES)
def test_archives_and_migrations_are_checked(entry: ArchiveEntry) -> None:
    with pytest.raises(errors.BadArchive, match="/f': invalid entry"):
        list(unpack_all(io.BytesIO(entry.pack())))
    with pytest.raises(errors.ProtocolError, match="receive_rows: inode"):
        rows("inode", memoryview(_message([_row(entry)])))


@pytest.mark.parametrize(("name", "value"), ODD_XATTRS)
def test_attributes_of_archives_and_migrations_are_checked(name: bytes, value: bytes) -> None:
    entry = ENTRY._replace(xattrs=[(b"user.good", b"kept"), (name, value)])
    with pytest.raises(errors.BadArchive, match="/f': invalid entry"):
        list(unpack_all(io.BytesIO(entry.pack())))
    with pytest.raises(errors.ProtocolError, match="receive_rows: xattr"):
        rows("xattr", memoryview(_message([[2, name, value]])))


def _message(found: list[list[Any]]) -> bytes:
    return bytes(join_rows([pack_row(row) for row in found]))


def test_times_from_elsewhere_are_clamped() -> None:
    entry = ENTRY.changed(atime=(1 << 64) - 1, mtime=-(1 << 63), ctime=(1 << 63) - 1)
    (found,) = unpack_all(io.BytesIO(entry.pack()))
    clamped = (domain.TIME_MAX, domain.TIME_MIN, domain.CHANGE_TIME_MAX)
    assert found.row[8:11] == clamped
    assert tuple(rows("inode", memoryview(_message([_row(entry)])))[0][8:11]) == clamped


def test_a_change_time_can_always_grow() -> None:
    """One that an import brought from the far future, too."""
    archive = io.BytesIO()
    with open_memory(MemoryConfig()) as target:
        made = target.namespace.mknod(1, b"f", 0o644, 0, 0)
        inode = target._catalogue.get(made.ino)
        assert inode is not None
        target._catalogue.set_attributes(inode, ctime=1 << 80)
        export(DirectLink(ProviderCore(0, target)), archive, copying=False)
    archive.seek(0)
    with open_memory(MemoryConfig()) as target:
        restore(DirectLink(ProviderCore(0, target)), archive)
        names = target.namespace
        before = names.resolve("/f").ctime_ns
        assert before == domain.CHANGE_TIME_MAX
        after = names.setattr(names.resolve("/f").ino, mode=0o600).ctime_ns
        assert before < after <= domain.TIME_MAX


def test_the_sum_of_sizes_may_have_more_than_64_bits(tmp_path: Path) -> None:
    path = tmp_path / "target"
    with open_target("file", path, checksums=None) as target:
        regions = [target.create(0) for _ in range(3)]
        for region in regions:
            target.namespace.link_name(region, f"/{region.hex()[:8]}{region.hex()[-8:]}")
    edit(path, f"UPDATE inode SET size = {(1 << 63) - 1} WHERE mode & 61440 = 32768")
    with open_target("file", path, checksums=None) as target:
        assert target.used == (1 << 63) - 1
        for region in regions:
            target.resize(region, 0)
        assert target.used == 0


def test_attributes_have_a_limit_together() -> None:
    with open_memory(MemoryConfig()) as target:
        names = target.namespace
        with pytest.raises(PathError) as caught:
            for number in itertools.count():
                names.setxattr(1, b"user.%0200d" % number, b"")
        assert caught.value.errno == errno.ENOSPC
        assert sum(len(name) + 1 for name in names.listxattr(1)) <= 64 * 1024
        names.setxattr(1, names.listxattr(1)[0], b"changed")  # takes no more room


def test_only_the_catalogue_sets_what_comes_from_outside() -> None:
    """Owners, access times, device numbers and targets of inodes are set by what checks them."""
    root = Path(warabi.__file__).parent
    for file in root.rglob("*.py"):
        for node in ast.walk(ast.parse(file.read_text())):
            if isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Store):
                inside = node.attr in ("uid", "gid", "atime", "rdev") and not (
                    isinstance(node.value, ast.Name) and node.value.id == "info"  # a tar member
                )
                if inside:
                    assert file.name in ("inode.py", "catalogue.py"), f"{file}:{node.lineno}"
