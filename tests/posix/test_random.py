"""A mount and a tmpfs, given the same random calls, give the same answers.

Set POSIX_SEED to repeat a run, POSIX_CALLS for another number of calls.
"""

from __future__ import annotations

import errno
import os
import random
import stat
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.mount.conftest import disposable
from tests.posix.conftest import MOUNTED
from tests.posix.support import AT_EACCESS, AT_FDCWD, check, directory, libc, renameat2, umask, user

CALLS = int(os.environ.get("POSIX_CALLS", "1500"))
USERS: list[tuple[Any, ...]] = [(0, 0), (0, 0), (1, 1), (1, 2), (2, 2, (1, 3)), (3, 3, (2,))]
MODES = (0o777, 0o755, 0o700, 0o644, 0o600, 0o000, 0o1777, 0o2775, 0o4755, 0o6711, 0o070, 0o007)
FLAGS = (
    os.O_RDONLY, os.O_WRONLY, os.O_RDWR, os.O_WRONLY | os.O_CREAT, os.O_RDWR | os.O_CREAT,
    os.O_WRONLY | os.O_CREAT | os.O_EXCL, os.O_WRONLY | os.O_TRUNC, os.O_RDONLY | os.O_DIRECTORY,
    os.O_RDONLY | os.O_NOFOLLOW, os.O_WRONLY | os.O_APPEND, os.O_RDWR | os.O_CREAT | os.O_TRUNC,
)  # fmt: skip


class Caller:
    """Random calls, each to be carried out below any directory.

    Args:
        seed: of every choice.
    """

    def __init__(self, seed: int) -> None:
        self.chance = random.Random(seed)

    def path(self) -> str:
        names = self.chance.choices("abcd", k=self.chance.choice((1, 1, 2, 2, 3)))
        return "/".join(names) + self.chance.choice(("",) * 12 + ("/", "/.", "/.."))

    def call(self) -> tuple[str, Callable[[Path], Any]]:
        """What it is, and what carries it out."""
        pick, one, two = self.chance.choice, self.path(), self.path()
        mode = pick(MODES)
        uid, gid = pick((-1, 0, 1, 2)), pick((-1, 0, 1, 2, 3))
        size, number, flags = pick((0, 1, 100, 5000)), pick((0, 0, 1, 2)), pick(FLAGS)
        name = pick(("user.a", "user.b", "trusted.a", "security.a", "bad"))
        entries = b"".join(
            who.to_bytes(2, "little") + pick((0, 4, 6, 7)).to_bytes(2, "little") + extra
            for who, extra in [
                (1, bytes(4)), (2, b"\1\0\0\0"), (4, bytes(4)), (8, b"\3\0\0\0"), (16, bytes(4)),
                (32, bytes(4)),
            ]
        )  # fmt: skip
        acl = pick(("system.posix_acl_access", "system.posix_acl_default"))
        kind = pick((stat.S_IFREG, stat.S_IFIFO, stat.S_IFSOCK))  # devices are inert on a mount
        calls: dict[str, tuple[str, Callable[[Path], Any]]] = {
            "open": (f"{one} {flags:#o} {mode:#o}", lambda d: _open(d / "x" / one, flags, mode)),
            "creat": (f"{one}", lambda d: _open(d / "x" / one, os.O_CREAT | os.O_WRONLY, 0o666)),
            "mkdir": (f"{one} {mode:#o}", lambda d: os.mkdir(_at(d, one), mode)),
            "mkdir_": (f"{one} {mode:#o}", lambda d: os.mkdir(_at(d, one), 0o777)),
            "rmdir": (one, lambda d: os.rmdir(_at(d, one))),
            "unlink": (one, lambda d: os.unlink(_at(d, one))),
            "mknod": (f"{one} {mode | kind:#o}", lambda d: os.mknod(_at(d, one), kind | mode)),
            "link": (
                f"{one} {two}",
                lambda d: os.link(_at(d, one), _at(d, two), follow_symlinks=False),
            ),
            "symlink": (f"{two} {one}", lambda d: os.symlink(two, _at(d, one))),
            "readlink": (one, lambda d: os.readlink(_at(d, one))),
            "rename": (
                f"{one} {two} {number}", lambda d: renameat2(_at(d, one), _at(d, two), number)
            ),
            "move": (f"{one} {two}", lambda d: os.rename(_at(d, one), _at(d, two))),
            "chmod": (f"{one} {mode:#o}", lambda d: os.chmod(_at(d, one), mode)),
            "chown": (f"{one} {uid} {gid}", lambda d: os.chown(_at(d, one), uid, gid)),
            "lchown": (f"{one} {uid} {gid}", lambda d: os.lchown(_at(d, one), uid, gid)),
            "truncate": (f"{one} {size}", lambda d: os.truncate(_at(d, one), size)),
            "utime": (one, lambda d: os.utime(_at(d, one), ns=(number, size))),
            "touch": (one, lambda d: os.utime(_at(d, one))),
            "stat": (one, lambda d: _facts(os.stat(_at(d, one)))),
            "list": (one, lambda d: sorted(os.listdir(_at(d, one)))),
            "access": (f"{one} {number}", lambda d: _may(_at(d, one), number)),
            "setxattr": (
                f"{one} {name}",
                lambda d: os.setxattr(_at(d, one), name, one.encode(), number),
            ),
            "getxattr": (f"{one} {name}", lambda d: os.getxattr(_at(d, one), name)),
            "removexattr": (f"{one} {name}", lambda d: os.removexattr(_at(d, one), name)),
            "listxattr": (one, lambda d: sorted(os.listxattr(_at(d, one)))),
            "setacl": (
                f"{one} {acl} {entries.hex()}",
                lambda d: os.setxattr(_at(d, one), acl, b"\2\0\0\0" + entries),
            ),
            "removeacl": (f"{one} {acl}", lambda d: os.removexattr(_at(d, one), acl)),
        }  # fmt: skip
        what = pick(list(calls))
        return f"{what} {calls[what][0]}", calls[what][1]


def _at(root: Path, path: str) -> str:
    return f"{root}/x/{path}"


def _may(path: str, how: int) -> int:
    """access(2) as the effective user."""
    return check(libc.faccessat(AT_FDCWD, path.encode(), how, AT_EACCESS))


def _open(path: Path, flags: int, mode: int) -> Any:
    fd = os.open(path, flags | os.O_NONBLOCK, mode)
    try:
        if flags & os.O_DIRECTORY:
            return sorted(os.listdir(fd))
        if flags & 3 and stat.S_ISREG(os.fstat(fd).st_mode):
            return os.write(fd, path.name.encode() * 100)
        return _facts(os.fstat(fd))
    finally:
        os.close(fd)


def _facts(found: os.stat_result) -> tuple[int, ...]:
    size = 0 if stat.S_ISDIR(found.st_mode) else found.st_size
    mode = found.st_mode
    if stat.S_ISREG(mode) and not mode & stat.S_IXGRP:
        mode &= ~stat.S_ISGID  # when it goes is among what docs/posix.md says is different
    return mode, found.st_nlink, found.st_uid, found.st_gid, size, found.st_rdev


def _tree(root: Path) -> dict[str, Any]:
    """All that can be known of a tree, but for times."""
    found: dict[str, Any] = {}
    for path in [root, *root.rglob("*")]:
        facts = _facts(path.lstat())
        names = sorted(os.listxattr(path, follow_symlinks=False))
        values = [os.getxattr(path, name, follow_symlinks=False) for name in names]
        data = path.read_bytes() if stat.S_ISREG(facts[0]) else b""
        found[str(path.relative_to(root))] = (facts, names, values, data)
    return found


def _answer(call: Callable[[Path], Any], root: Path) -> Any:
    try:
        return call(root)
    except OSError as error:
        return errno.errorcode[error.errno or 0]


@pytest.mark.parametrize("shared", MOUNTED, indirect=True, scope="package")
def test_a_mount_answers_as_a_tmpfs_does(where: Path) -> None:
    seed = int(os.environ.get("POSIX_SEED", "20"))
    print(f"POSIX_SEED={seed} POSIX_CALLS={CALLS}")
    caller = Caller(seed)
    history: list[str] = []
    with disposable("/dev/shm") as oracle:
        for root in (where, oracle):
            directory(root / "x", 0o777)
        for number in range(CALLS):
            what, call = caller.call()
            who, mask = caller.chance.choice(USERS), caller.chance.choice((0o022, 0o077, 0))
            with user(*who), umask(mask):
                wanted, found = _answer(call, oracle), _answer(call, where)
            history.append(f"{number} {who} {mask:#o} {what} -> {wanted}")
            assert found == wanted, "\n".join(history[-50:])
            if number % 50 == 0:
                assert _tree(where / "x") == _tree(oracle / "x"), "\n".join(history[-50:])
        assert _tree(where / "x") == _tree(oracle / "x"), "\n".join(history[-50:])
