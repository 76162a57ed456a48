"""The measured API operations: the call, the time of the C++ original, and the goal."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import partial

from benchmarks.peers import COPY_TCP, MEMCPY, PING_UNIX, SYNCED
from benchmarks.stats import Work
from warabi.client import RegionID, TargetHandle

KIB, MIB = 1 << 10, 1 << 20


@dataclass(frozen=True)
class Goal:
    """A limit in microseconds, or a multiple of what a peer took in the same run."""

    limit: float
    of: str = ""

    def value(self, peers: Mapping[str, float]) -> float:
        """Microseconds; NaN when the peer was not measured."""
        return self.limit * peers.get(self.of, float("nan")) if self.of else self.limit

    def __str__(self) -> str:
        return f"≤ {self.limit:.3g} × {self.of}" if self.of else f"≤ {self.limit:,.4g}"


@dataclass(frozen=True)
class Row:
    """One operation at one size.

    Attributes:
        make: its work on a target.
        original: the median of C++ Warabi, µs, by backend and way; measured once, elsewhere.
        goals: by way, or by backend and way where the backends differ.
    """

    name: str
    size: int
    make: Callable[[TargetHandle], Work]
    original: Mapping[str, str] = field(default_factory=dict)
    goals: Mapping[str, Goal] = field(default_factory=dict)

    @property
    def operation(self) -> str:
        return self.name.split()[0]

    @property
    def reads(self) -> bool:
        return self.name.startswith("read")

    @property
    def moves(self) -> bool:
        """Whether it is a plain copy, which peers can do too."""
        return self.name.startswith(("write ", "read_into "))

    def goal(self, backend: str, way: str) -> Goal | None:
        return self.goals.get(f"{backend}, {way}", self.goals.get(way))


def _making(target: TargetHandle, make: Callable[[], RegionID], most: int) -> Work:
    """What makes regions, which are erased when a round is over."""
    made: list[RegionID] = []

    def erase() -> None:
        for region in made:
            target.erase(region)
        made.clear()

    return Work(lambda: made.append(make()), after=erase, most=most)


def _create(size: int, target: TargetHandle) -> Work:
    return _making(target, partial(target.create, size), most=5000)


def _create_and_write(size: int, target: TargetHandle) -> Work:
    make = partial(target.create_and_write, b"c" * size)
    return _making(target, make, most=5000 if size < MIB else 100)


def _erase(size: int, target: TargetHandle) -> Work:
    made = [target.create(size)]

    def create() -> None:
        made[0] = target.create(size)

    return Work(lambda: target.erase(made[0]), before=create)


def _touched(target: TargetHandle, size: int) -> RegionID:
    """A region whose memory exists, and that the client has used before."""
    region = target.create_and_write(b"w" * size)
    place = bytearray(min(size, 64))
    for _ in range(3):
        target.read_into(region, 0, place)
        target.write(region, 0, place)
    return region


def _write(size: int, target: TargetHandle) -> Work:
    region = _touched(target, size)
    return Work(partial(target.write, region, 0, b"n" * size), size=size)


def _read_into(size: int, target: TargetHandle) -> Work:
    place = bytearray(b"p" * size)
    return Work(partial(target.read_into, _touched(target, size), 0, place), size=size)


def _read(size: int, target: TargetHandle) -> Work:
    return Work(partial(target.read, _touched(target, size), 0, size), size=size)


def _persist(size: int, target: TargetHandle) -> Work:
    region, data = _touched(target, size), b"d" * size
    target.persist(region, 0, size)
    return Work(
        partial(target.persist, region, 0, size),
        before=partial(target.write, region, 0, data),
    )


def outstanding(size: int, count: int, target: TargetHandle) -> Work:
    """*count* writes to regions of their own, all under way before the first is waited for."""
    regions = [_touched(target, size) for _ in range(count)]
    data = b"o" * size

    def call() -> None:
        for request in [target.write_async(region, 0, data) for region in regions]:
            request.wait()

    return Work(call, per=count)


def _goals(same: Goal, two: Goal, **others: Goal) -> dict[str, Goal]:
    """Goals of both backends; *file* is that of files where they differ, *tcp* that of TCP."""
    goals = {"same process": same, "two processes": two}
    if "file" in others:
        goals |= dict.fromkeys(("file, same process", "file, two processes"), others["file"])
    if "tcp" in others:
        goals["TCP"] = others["tcp"]
    return goals


def _original(*figures: str) -> dict[str, str]:
    names = (f"{b}, {w}" for b in ("memory", "file") for w in ("same process", "two processes"))
    return dict(zip(names, figures, strict=True))


_COPY_TCP = Goal(1 / 0.7, COPY_TCP)
_MEMCPY = Goal(1.3, MEMCPY)
_ROUND_TRIP = Goal(1.3, PING_UNIX)
_ORIGINAL = {
    64: _original("8.9", "5.5", "31", "22"),
    4 * KIB: _original("14", "23", "39", "37"),
    64 * KIB: _original("19", "38", "52", "65"),
    MIB: _original("98", "120", "210", "260"),
    16 * MIB: _original("1,070–2,090", "1,390–1,890", "3,520", "3,560"),
}
_GOALS = {
    64: _goals(Goal(1.5), Goal(2)),
    4 * KIB: _goals(Goal(2), Goal(2.5), file=Goal(4)),
    64 * KIB: _goals(Goal(4), Goal(4.5), file=Goal(15), tcp=_COPY_TCP),
    MIB: _goals(_MEMCPY, _MEMCPY, file=Goal(150), tcp=_COPY_TCP),
    16 * MIB: _goals(Goal(1.2, MEMCPY), Goal(1.2, MEMCPY), file=Goal(2500), tcp=_COPY_TCP),
}


def shown(size: int) -> str:
    """A size as text: 64 B, 4 KiB, 1 MiB."""
    for unit, name in ((MIB, "MiB"), (KIB, "KiB")):
        if size >= unit and size % unit == 0:
            return f"{size // unit} {name}"
    return f"{size} B"


def copies(size: int) -> list[Row]:
    """``write`` and ``read_into`` of *size* bytes."""
    original, goals = _ORIGINAL.get(size, {}), _GOALS.get(size, {})
    if size == 16 * MIB:  # the original's figure is of read_into
        return [
            Row(f"write {shown(size)}", size, partial(_write, size)),
            Row(f"read_into {shown(size)}", size, partial(_read_into, size), original, goals),
        ]
    return [
        Row(f"write {shown(size)}", size, partial(_write, size), original, goals),
        Row(f"read_into {shown(size)}", size, partial(_read_into, size), original, goals),
    ]


ROWS = [
    Row("create 4 KiB", 4 * KIB, partial(_create, 4 * KIB),
        _original("11.5", "26", "37", "52"), _goals(Goal(8), _ROUND_TRIP)),
    Row("create_and_write 64 B", 64, partial(_create_and_write, 64),
        _original("8.9", "5.6", "54", "45"), _goals(Goal(8), _ROUND_TRIP)),
    Row("create_and_write 1 MiB", MIB, partial(_create_and_write, MIB),
        _original("656", "713", "823", "845"), _goals(Goal(400), Goal(500))),
    *(row for size in _ORIGINAL for row in copies(size)),
    Row("read 16 MiB", 16 * MIB, partial(_read, 16 * MIB),
        _original("20,700", "20,700", "22,100", "23,600"), _goals(Goal(8000), Goal(8000))),
    Row("persist 4 KiB", 4 * KIB, partial(_persist, 4 * KIB),
        _original("8.6", "5.9", "144", "168"),
        {f"file, {way}": Goal(1.2, SYNCED) for way in ("same process", "two processes")}),
    Row("erase 4 KiB", 4 * KIB, partial(_erase, 4 * KIB),
        _original("8.1", "4.9", "33", "21"), _goals(Goal(6), _ROUND_TRIP)),
    Row("64 outstanding writes of 4 KiB, each", 4 * KIB, partial(outstanding, 4 * KIB, 64),
        _original("12", "8.6", "16", "13"), _goals(Goal(6), Goal(6))),
]  # fmt: skip
