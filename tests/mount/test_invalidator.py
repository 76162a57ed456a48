"""Cache invalidations by a mount, if the kernel or the provider fails or lacks support."""

from __future__ import annotations

import threading
from collections.abc import AsyncGenerator, Callable
from typing import Any

import pytest
import trio

from warabi import errors
from warabi._core.attributes import ROOT
from warabi._core.changes import ATTRIBUTES, CONTENT, Changes
from warabifs.fs import invalidator
from warabifs.fs.filesystem import FileSystem
from warabifs.fs.invalidator import Follower

Told = list[Any]


class Script:
    """A target whose ``changes`` are those of one list after the other, each ended by its error."""

    def __init__(self, *rounds: tuple[list[Changes], Exception]) -> None:
        self._rounds = list(rounds)
        self.asked = 0
        self.exhausted = trio.Event()

    async def changes(self, *, new_names: bool) -> AsyncGenerator[Changes, None]:
        self.asked += 1
        if not self._rounds:
            self.exhausted.set()
            await trio.sleep_forever()
        items, error = self._rounds.pop(0)
        for item in items:
            yield item
        raise error


def follower(
    target: Script, forget_inode: Callable[[int, bool], None], names: Told | None = None
) -> Follower:
    files = FileSystem(
        target,  # type: ignore[arg-type]
        exclusive=False,
        attr_timeout=1.0,
        drop_name=lambda *_: None,
    )
    told = names if names is not None else []
    return Follower(
        target,  # type: ignore[arg-type]
        files,
        forget_inode=forget_inode,
        forget_name=lambda parent, name: told.append((parent, name)),
        new_names=False,
    )


def changed(*inodes: int, what: int = CONTENT) -> Changes:
    return Changes(1, False, dict.fromkeys(inodes, what), {})


async def test_only_inodes_that_the_kernel_knows_are_invalidated() -> None:
    told: Told = []
    target = Script(
        (
            [
                changed(ROOT, 5, what=ATTRIBUTES),
                Changes(2, False, {ROOT: CONTENT}, {(ROOT, b"name"): 7, (9, b"name"): 8}),
            ],
            errors.ProtocolError("unknown operation 'watch'"),
        )
    )
    names: Told = []
    await follower(target, lambda ino, only: told.append((ino, only)), names).run()
    assert told == [(ROOT, True), (ROOT, False)]
    assert names == [(ROOT, b"name")]


async def test_a_provider_without_notifications_is_asked_once(
    caplog: pytest.LogCaptureFixture,
) -> None:
    target = Script(([], errors.ProtocolError("unknown operation 'watch'")))
    with trio.fail_after(10):
        await follower(target, lambda *_: None).run()
    assert target.asked == 1
    assert "appear when timeouts expire" in caplog.text


async def test_an_outage_invalidates_everything_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(invalidator, "FOLLOW_PAUSE", 0.01)
    lost = errors.ConnectionLost("the provider is gone")
    target = Script(([], lost), ([], lost), ([], lost), ([changed(ROOT)], lost))
    told: Told = []
    one = follower(target, lambda ino, only: told.append((ino, only)))
    with trio.fail_after(30):
        async with trio.open_nursery() as nursery:
            nursery.start_soon(one.run)
            await target.exhausted.wait()
            nursery.cancel_scope.cancel()
    assert told == [(ROOT, False)] * 3  # gone, told of a change, and gone again


async def test_inodes_that_the_kernel_has_forgotten_are_skipped() -> None:
    told: Told = []

    def forget(ino: int, only: bool) -> None:
        told.append(ino)
        raise FileNotFoundError

    end = errors.ProtocolError("the end")
    await follower(Script(([changed(ROOT), changed(ROOT)], end)), forget).run()
    assert told == [ROOT, ROOT]


async def test_an_ended_kernel_connection_is_not_logged_as_an_exception(
    caplog: pytest.LogCaptureFixture,
) -> None:
    def forget(ino: int, only: bool) -> None:
        raise OSError(107, "not connected")

    end = errors.ProtocolError("the end")
    await follower(Script(([changed(ROOT)], end)), forget).run()
    assert "invalidating kernel caches failed" not in caplog.text


async def test_the_mount_ends_though_the_kernel_does_not_answer() -> None:
    inside, release = threading.Event(), threading.Event()

    def forget(ino: int, only: bool) -> None:
        inside.set()
        assert release.wait(60)

    one = follower(Script(([changed(ROOT)], errors.ConnectionLost("gone"))), forget)
    try:
        with trio.fail_after(30):
            async with trio.open_nursery() as nursery:
                nursery.start_soon(one.run)
                await trio.to_thread.run_sync(inside.wait)
                nursery.cancel_scope.cancel()
            await one.stop()  # waits a moment, and not for ever
            release.set()
            await one._out.wait()
    finally:
        release.set()
