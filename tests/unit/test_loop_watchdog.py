"""The watchdog reports a blocked event loop once, with a stack, and nothing else."""

from __future__ import annotations

import logging
import threading
import time
from pathlib import Path

import pytest
import trio

from tests.support.helpers import MEMORY, eventually
from tests.support.loops import watched_loops
from warabi._core import log_limit
from warabi._core.log_limit import BURST, RateLimit
from warabi._core.tuning import LOOP_HOLD
from warabi.client import Client
from warabi.engine import Engine, client
from warabi.eventloop import gc_pauses, loop_watchdog
from warabi.eventloop.loop_watchdog import LoopWatchdog
from warabi.server import Provider
from warabi.target.handlers import CALLS


def _hold(reported: threading.Event) -> None:
    deadline = time.monotonic() + 30
    while not reported.is_set() and time.monotonic() < deadline:
        sum(range(1000))


def test_a_held_loop_is_reported_once_with_its_stack() -> None:
    found: list[tuple[float, str]] = []
    reported = threading.Event()

    def report(seconds: float, stack: str) -> None:
        found.append((seconds, stack))
        reported.set()

    async def main() -> None:
        await trio.lowlevel.checkpoint()
        _hold(reported)
        time.sleep(0.3)  # it is still the same hold
        await trio.sleep(0.01)

    trio.run(main, instruments=[LoopWatchdog(0.05, report)])
    [(seconds, stack)] = found
    assert seconds > 0.05
    assert "_hold (test_loop_watchdog.py:" in stack
    assert "main (test_loop_watchdog.py:" in stack
    assert "\n" not in stack


def test_a_loop_that_waits_is_not_reported() -> None:
    found: list[str] = []

    async def main() -> None:
        for _ in range(10):
            await trio.sleep(0.05)

    trio.run(main, instruments=[LoopWatchdog(20, lambda seconds, stack: found.append(stack))])
    assert found == []


class _SlowToNotice(threading.Event):
    def wait(self, timeout: float | None = None) -> bool:
        woken = super().wait(timeout)
        time.sleep(2.5)
        return woken


def test_the_end_of_a_loop_that_waits_for_the_watchdog_is_not_reported() -> None:
    found: list[str] = []
    watchdog = LoopWatchdog(2, lambda seconds, stack: found.append(stack))
    watchdog._wake = _SlowToNotice()

    async def main() -> None:
        await trio.lowlevel.checkpoint()

    trio.run(main, instruments=[watchdog])
    assert not watchdog._thread.is_alive()
    assert found == []


def test_it_sleeps_while_the_loop_is_idle_and_wakes_with_it(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(loop_watchdog, "WATCHDOG_IDLE", 0.05)
    collected: list[int] = []
    monkeypatch.setattr(gc_pauses, "collect_while_idle", lambda: collected.append(1))
    reported = threading.Event()
    watchdog = LoopWatchdog(0.05, lambda seconds, stack: reported.set())

    def dozing() -> bool:
        return watchdog._dozing

    async def main() -> None:
        for _ in range(2):
            await trio.to_thread.run_sync(eventually, dozing)  # the answer wakes it
            assert collected.pop()
            reported.clear()
            _hold(reported)
            assert reported.is_set()

    trio.run(main, instruments=[watchdog])
    assert not watchdog._thread.is_alive()


@pytest.mark.parametrize(("text", "expected"), [("", 0.25), ("2.5", 2.5), ("0", None), ("x", 0.25)])
def test_setting(text: str, expected: float | None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(loop_watchdog.SETTING, text)
    found = [one._threshold for one in loop_watchdog.instruments()]  # type: ignore[attr-defined]
    assert found == ([] if expected is None else [expected])


def test_setting_is_documented() -> None:
    text = (Path(__file__).parents[2] / "docs" / "security.md").read_text()
    assert f"`{loop_watchdog.SETTING}`" in text
    assert f"{LOOP_HOLD:g} s" in text


def test_a_provider_logs_what_holds_its_loop(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv(loop_watchdog.SETTING, "0.05")
    said = threading.Event()

    def seen(record: logging.LogRecord) -> bool:
        said.set()
        return True

    caplog.handler.addFilter(seen)
    with Engine("na+sm") as engine, Provider(engine, 1, MEMORY):
        assert engine._state.runtime is not None
        token = engine._state.runtime._token
        assert token is not None
        token.run_sync_soon(_hold, said)
        assert said.wait(30)
    caplog.handler.removeFilter(seen)
    assert "the event loop has been held for" in caplog.text
    assert "_hold (test_loop_watchdog.py:" in caplog.text


def test_tests_notice_processor_time(monkeypatch: pytest.MonkeyPatch) -> None:
    def slow(*args: object) -> int:
        until = time.thread_time() + 0.1
        while time.thread_time() < until:
            pass
        return 5

    with (
        watched_loops() as held,
        Engine("na+sm") as engine,
        Provider(engine, 1, MEMORY),
        Engine("na+sm", client) as own,
    ):
        handle = Client(own).make_target_handle(str(engine.addr()), 1)
        region = handle.create_and_write(b"x")
        monkeypatch.setitem(CALLS, "size", slow)
        assert handle._link.call("size", region) == 5
    [hold] = [one for one in held if "slow (test_loop_watchdog.py:" in one.stack]
    assert hold.used > 0.1


def test_repeated_messages_are_limited(
    caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(log_limit, "LOG_INTERVAL", 3600)
    log = logging.getLogger("warabi.a_test")
    log.addFilter(RateLimit())
    for number in range(BURST + 5):
        log.warning("the number %d", number)
    log.warning("something else")
    expected = [*(f"the number {number}" for number in range(BURST)), "something else"]
    assert caplog.messages == expected
    monkeypatch.setattr(log_limit, "LOG_INTERVAL", 1e-9)
    log.warning("the number %d", 99)
    assert caplog.messages[-1] == "the number 99 (5 similar messages omitted)"


def test_a_repeated_exception_hides_no_other_one(
    caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(log_limit, "LOG_INTERVAL", 3600)
    log = logging.getLogger("warabi.another_test")
    log.addFilter(RateLimit())
    for divisor in (*[0] * (BURST + 5), "text"):
        try:
            1 / divisor  # type: ignore[operator]
        except (ZeroDivisionError, TypeError):
            log.exception("unhandled")
    assert len(caplog.records) == BURST + 1
    assert "TypeError" in caplog.text
