"""What was found and done, and the place beside the target for what it cannot keep."""

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
    """``PATH.lost+found/``: files without a row, old catalogues, and a log; made when needed."""

    def __init__(self, path: Path) -> None:
        self.directory = Path(f"{path}.lost+found")

    def _free(self, name: str) -> Path:
        """A path in the directory that nothing has."""
        self.directory.mkdir(mode=0o700, exist_ok=True)
        place, number = self.directory / name, 0
        while os.path.lexists(place):
            number += 1
            place = self.directory / f"{name}.{number}"
        return place

    def move(self, file: Path) -> Path:
        """Move *file* here; returns where it is."""
        place = self._free(file.name)
        file.rename(place)
        sync_directory(self.directory)
        return place

    def copy(self, file: Path, name: str) -> Path:
        """Keep a copy of *file* here, on the medium; returns where it is."""
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
    """What a check found.

    Attributes:
        corrected: problems that were repaired.
        left: problems that were not.
    """

    def __init__(self, lost: LostFound, *, repair: bool, say: Callable[[str], None]) -> None:
        self.corrected = 0
        self.left = 0
        self._lost = lost
        self._repair = repair
        self._say = say

    @property
    def repairing(self) -> bool:
        """Whether anything is repaired."""
        return self._repair

    @property
    def status(self) -> int:
        """The exit status that fsck(8) documents."""
        return (1 if self.corrected else 0) | (4 if self.left else 0)

    def problem(self, what: str, remedy: str, *, details: str = "") -> bool:
        """Something is wrong; returns whether to do what *remedy* says.

        *details* are written to the log first, if so: what is about to be gone.
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
        """Something to know that is no damage; returns whether to do what *remedy* says."""
        doing = self._repair and bool(remedy)
        text = f"{what}: {remedy}" if doing else what
        self._say(text)
        if doing:
            self._lost.log(text)
        return doing
