"""The status page: in a browser, without JavaScript, small and fast, and safe with hostile text."""

from __future__ import annotations

import contextlib
import json
import re
import time
from collections.abc import Iterator
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
from playwright.sync_api import Browser, ConsoleMessage, Dialog, Page, sync_playwright

from tests.mount.conftest import place
from tests.mount.support import mounting
from tests.provider.test_metrics import free_port, get
from tests.support.helpers import ROOT, RawPeer, eventually, file_config, raw_connection
from tests.tools.test_cli import serving
from warabi._core.counters import Counters, Totals
from warabi.client import Client
from warabi.engine import Engine, client
from warabi.monitoring.history import History
from warabi.monitoring.page import StatusPage
from warabi.protocol.operations import OPERATIONS
from warabi.provider.report import counters_report, process_report

__all__ = ["place"]

HOSTILE = """<script>alert(1)</script><img src=x onerror="alert(2)">'"--></style></table>{{7*7}}"""
LIMIT = 30_000.0
"""Milliseconds after which something in the browser counts as hung."""


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    with sync_playwright() as playwright:
        made = playwright.chromium.launch(
            executable_path="/usr/bin/chromium", args=["--no-sandbox", "--disable-gpu"]
        )
        try:
            yield made
        finally:
            made.close()


@contextlib.contextmanager
def showing(browser: Browser, url: str, **settings: Any) -> Iterator[Page]:
    """A page in the browser, on which nothing is reported as an error."""
    with contextlib.closing(browser.new_context(**settings)) as context:
        page = context.new_page()
        page.set_default_timeout(LIMIT)
        problems: list[str] = []

        def note(message: ConsoleMessage) -> None:
            if "ERR_CONNECTION" not in message.text:  # a server that has gone
                problems.append(message.text)

        def dismiss(dialog: Dialog) -> None:
            problems.append("a dialog")
            dialog.dismiss()

        page.on("console", note)
        page.on("pageerror", lambda error: problems.append(str(error)))
        page.on("dialog", dismiss)
        page.goto(url)
        yield page
        assert problems == []


def becomes_true(page: Page, condition: str) -> None:
    eventually(lambda: page.evaluate(condition))


def test_it_shows_a_service_and_is_live(browser: Browser, tmp_path: Path) -> None:
    port, target = free_port(), tmp_path / "<b onclick='x'>&amp;"
    config = tmp_path / "config.json"
    providers = [
        {"type": "warabi", "provider_id": 1, "config": file_config(target)},
        {"type": "warabi", "provider_id": 2},
    ]
    config.write_text(json.dumps({"providers": providers}))
    with (
        serving(config, "--http", str(port)) as service,
        Engine("na+sm", client, config={"share": False}) as engine,
    ):
        address = service.address
        handle = Client(engine).make_target_handle(address, 1)
        handle.create_and_write(bytes(5000))
        with raw_connection(address) as connection:
            assert RawPeer(connection).call([0, 1, HOSTILE, [], None])[3]
        with showing(browser, f"http://127.0.0.1:{port}/") as page:
            text = page.inner_text("main")
            assert f"Engine {address}" in text
            assert str(target) in text
            assert "provider 2 has no target" in text
            assert f"unknown operation '{HOSTILE[:30]}" in text
            assert re.search(r"create_and_write\s+1\s+0\s+4\.88 KiB", text)
            assert page.evaluate("document.scripts.length") == 1
            assert page.evaluate("document.images.length") == 0
            page.evaluate("document.querySelector('main').dataset.old = 'yes'; window.kept = 1")
            handle.erase(next(handle.list()))
            eventually(
                lambda: page.evaluate("document.querySelector('main').innerText.includes('erase')")
            )
            assert page.evaluate("window.kept") == 1  # it was not loaded again
            assert page.evaluate("document.querySelector('main').dataset.old") is None
            assert page.inner_text("#state") == "live"
            eventually(
                lambda: page.evaluate("document.querySelectorAll('polyline')[0].points.length > 1")
            )
            service.end()
            eventually(
                lambda: page.evaluate("document.getElementById('state').innerText != 'live'")
            )
            assert page.inner_text("#state") == "not answering"


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_it_can_be_read_on_a_telephone(browser: Browser, place: Path, scheme: str) -> None:
    """A mount's page, 360 px wide: nothing is beyond the edge, and contrasts suffice (WCAG AA)."""
    port = free_port()
    with mounting("memory:", place, f"http={port}") as mount:
        (mount.path / "file").write_bytes(bytes(1000))
        settings = {"color_scheme": scheme, "viewport": {"width": 360, "height": 740}}
        with showing(browser, f"http://127.0.0.1:{port}/", **settings) as page:
            assert f"Mount {mount.path}" in page.inner_text("h1")
            assert "mknod" in page.inner_text("main")
            assert page.evaluate("document.documentElement.scrollWidth") <= 360
            background = page.evaluate("getComputedStyle(document.body).backgroundColor")
            assert (luminance(background) > 0.5) == (scheme == "light")
            for what in ("h1", "p", "td", "th", "figcaption span", "footer"):
                color = page.evaluate(f"getComputedStyle(document.querySelector('{what}')).color")
                bright, dim = sorted((luminance(color), luminance(background)), reverse=True)
                assert (bright + 0.05) / (dim + 0.05) > 4.5, what


def luminance(color: str) -> float:
    """The relative luminance of ``rgb(...)``, as WCAG 2 defines it."""
    parts = [int(part) / 255 for part in re.findall(r"\d+", color)[:3]]
    linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in parts]
    return sum(f * c for f, c in zip((0.2126, 0.7152, 0.0722), linear, strict=True))


def test_it_works_without_javascript(browser: Browser) -> None:
    port = free_port()
    with serving("-t", "memory:", "--http", str(port), "--metrics", str(port)) as service:
        address = service.address
        with showing(browser, f"http://127.0.0.1:{port}/", java_script_enabled=False) as page:
            assert f"Engine {address}" in page.inner_text("h1")
            assert page.locator("table").count() == 6
            assert page.locator("noscript meta[http-equiv=refresh]").count() == 1
            assert page.locator("meter").count() == 1
        assert "warabi_target_up" in get(port)[1]  # the same server
        with Engine("na+sm", client, config={"share": False}) as engine:
            handle = Client(engine).make_target_handle(address, 0)
            lengths = set()
            for call in (lambda: handle.create(1), lambda: list(handle.list())):
                call()
                status, text = get(port, "/")
                assert (status, text[-7:]) == (200, "</html>")
                lengths.add(len(text))
            assert len(lengths) == 2
        assert service.end() == ""


class Elements(HTMLParser):
    """The elements and attributes of a page, and its text."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.found: set[tuple[str, str]] = set()
        self.text = ""
        self.feed(page)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.found |= {(tag, ""), *((tag, name) for name, _ in attrs)}

    def handle_data(self, data: str) -> None:
        self.text += data


def a_report(targets: int, text: str, kind: str = "engine") -> dict[str, Any]:
    """A report of an engine with many targets, where *text* is wherever a text can be."""
    counters = Counters()
    for name in list(OPERATIONS)[:30]:
        for number in range(60):
            counters.add(name, 1 << number % 34)
        counters.add_bytes(name, 1 << 40)
        counters.fail(name, ValueError(text), text)
    counters.add(text, 10**10)
    counters.add_error(text, text)
    target = {"uuid": text, "regions": 10**9, "used": 10**15, "total": 10**16}
    one = {
        "provider_id": 65535, "type": text, "path": text, "error": None, "migration": True,
        "target": {**target, "available": 10**13, "quota": None}, **counters_report(counters),
    }  # fmt: skip
    found = {
        "kind": kind, "address": text, "source": text, "mountpoint": text, "front_end": text,
        "options": [text], "open_files": 1, **process_report(), "version": text,
        "connections": {"open": 1000, "accepted": 10**6},
        "clients": [
            {
                "client": text, "since": 0.0, "read_only": False, "requests": 10**9, "pending": 9,
                "watches": 1, "direct_access": True,
            }
        ] * 200,
        "targets": [*[one] * (targets - 1), {**one, "target": None, "error": text}],
    }  # fmt: skip
    return {**found, **counters_report(counters)} if kind == "mount" else found


@pytest.mark.parametrize("kind", ["engine", "mount"])
def test_text_from_outside_is_text(kind: str) -> None:
    page = StatusPage(History(list))
    harmless = Elements(page.render(a_report(3, "harmless", kind)))
    hostile = Elements(page.render(a_report(3, HOSTILE, kind)))
    assert hostile.found == harmless.found
    assert hostile.text.count(HOSTILE) >= harmless.text.count("harmless") > 20
    template = (ROOT / "warabi" / "monitoring" / "status.html").read_text()
    assert not re.search(r"safe|autoescape|\|\s*e\b", template)


def test_a_hundred_targets_are_a_small_page_and_made_fast() -> None:
    history, seconds = History(lambda: [Totals(int(now[0]) ** 2, 5, 10**9)], lambda: now[0]), []
    now = [0.0]
    for number in range(400):
        now[0] = number * 2.0
        history.tick()
    assert len(history.rates()) == 150
    page, report = StatusPage(history), a_report(100, "/a/path/of/a/usual/length/<&>")
    for _ in range(5):
        began = time.process_time()
        text = page.render(report)
        seconds.append(time.process_time() - began)
    assert min(seconds) < 0.05
    assert len(text.encode()) < 100_000
    assert text.count("65535") >= 100
    assert "and 950 more" in text  # clients
    most = StatusPage(history).render(a_report(1000, "x" * 10_000))
    assert len(most.encode()) < 300_000


def test_rates() -> None:
    now, counted = [0.0], [Totals(0, 0, 0)]
    history = History(lambda: counted, lambda: now[0])
    assert history.rates() == []
    history.tick()
    now[0], counted[:] = 1.9, [Totals(1000, 0, 0)]
    history.tick()  # too early
    assert history.rates() == []
    now[0], counted[:] = 4.0, [Totals(30, 2, 0), Totals(10, 0, 100)]
    history.tick()
    now[0], counted[:] = 6.0, [Totals(30, 2, 0)]  # a provider was closed
    history.tick()
    assert history.rates() == [(10.0, 0.5, 25.0), (0.0, 0.0, 0.0)]


def test_the_screenshot_in_the_documents_is_small() -> None:
    picture = ROOT / "docs" / "status-page.png"
    assert picture.read_bytes().startswith(b"\x89PNG")
    assert picture.stat().st_size < 100_000
