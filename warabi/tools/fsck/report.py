"""The report of a check, and the directory for files that the target cannot keep."""

from __future__ import annotations

import os
import shutil
import time
from collections.abc import Callable
from pathlib import Path

from warabi.metadata.journal import sync_directory


def _private(path: str, flags: int) -> int:
    return os.open(path, flags, 0o600)


class LostFound:
    """``PATH.lost+found/``: files without a row, old catalogues, and a log; created when needed."""

    def __init__(self, path: Path) -> None:
        self.directory = Path(f"{path}.lost+found")

    def _free(self, name: str) -> Path:
        """Return an unused path in the directory."""
        self.directory.mkdir(mode=0o700, exist_ok=True)
        place, number = self.directory / name, 0
        while os.path.lexists(place):
            number += 1
            place = self.directory / f"{name}.{number}"
        return place

    def move(self, file: Path) -> Path:
        """Move *file* here; returns its new path."""
        place = self._free(file.name)
        file.rename(place)
        sync_directory(self.directory)
        return place

    def copy(self, file: Path, name: str) -> Path:
        """Copy *file* here durably; returns the path of the copy."""
        place = self._free(name)
        shutil.copy2(file, place)
        with open(place, "rb") as copy:
            os.fsync(copy.fileno())
        sync_directory(self.directory)
        return place

    def log(self, text: str) -> None:
        self.directory.mkdir(mode=0o700, exist_ok=True)
        line = f"{time.strftime('%Y-%m-%dT%H:%M:%S%z')} {text}\n"
        with open(self.directory / "fsck.log", "ab", buffering=0, opener=_private) as file:
            file.write(os.fsencode(line))
            os.fsync(file.fileno())


class Report:
    """The results of a check.

    Attributes:
        corrected: number of problems that were repaired.
        left: number of problems that were not.
    """

    def __init__(self, lost: LostFound, *, repair: bool, say: Callable[[str], None]) -> None:
        self.corrected = 0
        self.left = 0
        self._lost = lost
        self._repair = repair
        self._say = say

    @property
    def repairing(self) -> bool:
        """Whether repairs are enabled."""
        return self._repair

    @property
    def status(self) -> int:
        """The exit status as documented by fsck(8)."""
        return (1 if self.corrected else 0) | (4 if self.left else 0)

    def problem(self, what: str, remedy: str, *, details: str = "") -> bool:
        """Report a problem; returns whether to apply *remedy*.

        If so, *details* are written to the log first: they describe what will be lost.
        """
        if not self._repair:
            self.left += 1
            self._say(what)
            return False
        self.corrected += 1
        self._say(f"{what}: {remedy}")
        self._lost.log(f"{what}: {remedy}{details and f': {details}'}")
        return True

    def note(self, what: str, remedy: str = "") -> bool:
        """Report something that is not damage; returns whether to apply *remedy*."""
        doing = self._repair and bool(remedy)
        text = f"{what}: {remedy}" if doing else what
        self._say(text)
        if doing:
            self._lost.log(text)
        return doing
