"""Directories for local sockets that other users cannot take, enter or replace."""

from __future__ import annotations

import os
import stat
from pathlib import Path

import pytest

from warabi.errors import ConnectionFailed, PermissionDenied
from warabi.protocol import address, socket_directories

OTHER = 65534


@pytest.fixture
def places(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[Path]:
    """Where a directory may be: the first place has no parent, as in a container without /run."""
    found = [tmp_path / "absent" / "warabi", *(tmp_path / f"place{n}" for n in range(4))]
    monkeypatch.setattr(socket_directories, "places", lambda uid: found)
    monkeypatch.delenv("WARABI_RUNTIME_DIR")
    return found


def test_the_best_place_is_one_where_others_make_nothing() -> None:
    assert socket_directories.places(0)[0] == Path("/run/warabi")
    assert socket_directories.places(1000)[0] == Path("/run/user/1000/warabi")
    for uid in (0, 1000):
        rest = socket_directories.places(uid)[1:]
        assert len(set(rest)) == len(rest) > 1
        assert all(path.parent == Path("/tmp") for path in rest)


def test_places_that_others_took_are_passed_over(places: list[Path]) -> None:
    places[1].mkdir(0o700)
    os.chown(places[1], OTHER, OTHER)  # another user's
    places[2].mkdir()
    places[2].chmod(0o755)  # that others may enter
    places[3].symlink_to(places[1])  # that another user can have lead elsewhere
    assert socket_directories.made(0) == places[4]
    assert stat.S_IMODE(places[4].stat().st_mode) == 0o700
    assert list(socket_directories.existing(0)) == [places[4]]
    places[4].rmdir()
    places[4].write_bytes(b"")
    with pytest.raises(PermissionDenied) as caught:
        socket_directories.made(0)
    assert all(str(place) in str(caught.value) for place in places)


def test_an_engine_is_found_where_its_user_could_make_a_place(places: list[Path]) -> None:
    places[1].mkdir(0o700)
    os.chown(places[1], OTHER, OTHER)
    listener, endpoint = address.listen(address.parse("na+sm", complete=False), protected=False)
    with listener:
        path = address.local_path(endpoint)
        assert path.parent == places[2]
        address.connect(endpoint, 5.0).close()
    # What another user put in place of the socket is not even looked at.
    path.rename(places[1] / path.name)
    with pytest.raises(ConnectionFailed, match="no such engine"):
        address.connect(endpoint, 5.0)


@pytest.mark.parametrize("mode", [0o755, 0o710])
def test_a_chosen_place_must_be_private(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, mode: int
) -> None:
    place = tmp_path / "chosen"
    place.mkdir()
    place.chmod(mode)
    monkeypatch.setenv("WARABI_RUNTIME_DIR", str(place))
    with pytest.raises(PermissionDenied, match="WARABI_RUNTIME_DIR"):
        address.runtime_directory()
