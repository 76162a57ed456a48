"""Metrics for Prometheus: of real processes, over real sockets, parsed by its own parser."""

from __future__ import annotations

import base64
import contextlib
import errno
import http.client
import json
import os
import re
import signal
import socket
import ssl
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import trustme
from prometheus_client.parser import text_string_to_metric_families

from tests.mount.conftest import place
from tests.mount.support import mounting, run
from tests.support.helpers import (
    PATIENCE,
    ROOT,
    eventually,
    file_config,
    tls_config,
)
from tests.tools.test_cli import fails, serving
from warabi._core.counters import Counters
from warabi.client import Client
from warabi.engine import Engine, client
from warabi.errors import ConfigError, PermissionDenied
from warabi.monitoring import monitored
from warabi.monitoring.http import HttpServer
from warabi.monitoring.prometheus import BOUNDS
from warabi.protocol.auth import Security
from warabi.provider.report import counters_report, process_report

__all__ = ["place"]

TOKEN = "0123456789abcdef-token"
Samples = dict[tuple[str, frozenset[tuple[str, str]]], float]


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port: int = listener.getsockname()[1]
        return port


def get(
    port: int,
    path: str = "/metrics",
    *,
    method: str = "GET",
    tls: ssl.SSLContext | None = None,
    **headers: str,
) -> tuple[int, str]:
    connection: http.client.HTTPConnection
    if tls is not None:
        connection = http.client.HTTPSConnection("localhost", port, timeout=PATIENCE, context=tls)
    else:
        connection = http.client.HTTPConnection("127.0.0.1", port, timeout=PATIENCE)
    with contextlib.closing(connection):
        connection.request(method, path, headers=headers)
        answer = connection.getresponse()
        return answer.status, answer.read().decode()


def samples(port: int) -> Samples:
    status, text = get(port)
    assert status == 200, text
    found = {}
    for family in text_string_to_metric_families(text):
        assert family.documentation
        assert family.type != "unknown"
        for sample in family.samples:
            key = sample.name, frozenset(sample.labels.items())
            assert key not in found
            found[key] = sample.value
    return found


def value(found: Samples, name: str, **labels: str) -> float | None:
    return found.get((name, frozenset(labels.items())))


def a_report() -> dict[str, Any]:
    return {
        "kind": "engine", "address": "na+sm://1-0", **process_report(), "provider_ids": [0],
        "connections": {"open": 0, "accepted": 0}, "clients": [],
        "targets": [
            {
                "provider_id": 0, "type": None, "path": None, "target": None, "error": "none",
                **counters_report(Counters()),
            }
        ],
    }  # fmt: skip


@contextlib.contextmanager
def server(security: Security | None = None) -> Iterator[int]:
    """The port of a server in this process, for which its thread is started."""
    made = HttpServer("--metrics ", "127.0.0.1:0", security or Security(), {"/metrics": _hello})
    try:
        yield made.server_port
    finally:
        made.close()


def _hello(environ: Any, start: Any) -> list[bytes]:
    start("200 OK", [("Content-Type", "text/plain")])
    return [b"hello"]


def test_metrics_of_a_service(tmp_path: Path) -> None:
    port = free_port()
    config = tmp_path / "config.json"
    providers = [
        {"type": "warabi", "provider_id": 3, "config": file_config(tmp_path / 'a "target"\\')},
        {"type": "warabi", "provider_id": 4, "config": {}},
    ]
    config.write_text(json.dumps({"providers": providers}))
    with serving(config, "--metrics", f"127.0.0.1:{port}") as service:
        address = service.address
        with Engine("na+sm", client, config={"share": False}) as engine:
            target = Client(engine).make_target_handle(address, 3)
            region = target.create_and_write(bytes(10_000))
            for _ in range(20):
                target.read(region, 0, 10_000)
            for _ in range(2):
                with pytest.raises(FileNotFoundError):
                    target.open_name("/none")

            def read_all() -> bool:
                count = "warabi_request_duration_seconds_count"
                return value(samples(port), count, provider="3", operation="open_name") == 2

            eventually(read_all)
            found = samples(port)
            about = {"provider": "3", "operation": "read"}
            assert value(found, "warabi_request_duration_seconds_count", **about) == 20
            assert value(found, "warabi_transferred_bytes_total", **about) == 200_000
            buckets = sorted(
                (float(dict(labels)["le"]), number)
                for (name, labels), number in found.items()
                if name == "warabi_request_duration_seconds_bucket" and about.items() <= labels
            )
            assert [bound for bound, _ in buckets[:-1]] == BOUNDS
            assert [number for _, number in buckets] == sorted(number for _, number in buckets)
            assert buckets[-1] == (float("inf"), 20)
            errors = {"provider": "3", "operation": "open_name", "error": "ENOENT"}
            assert value(found, "warabi_request_errors_total", **errors) == 2
            assert value(found, "warabi_target_regions", provider="3") == 1
            assert value(found, "warabi_target_used_bytes", provider="3") == 10_000
            assert value(found, "warabi_target_up", provider="3") == 1
            assert value(found, "warabi_target_up", provider="4") == 0
            assert value(found, "warabi_clients") == 1
            info = {"provider": "3", "uuid": target.link.call("uuid"), "type": "file"}
            path = str(tmp_path / 'a "target"\\')
            assert value(found, "warabi_target_info", **info, path=path) == 1
            assert found["process_open_fds", frozenset()] > 0
        eventually(lambda: value(samples(port), "warabi_clients") == 0)
        descriptors = len(os.listdir(f"/proc/{service.process.pid}/fd"))
        for _ in range(50):
            samples(port)
        eventually(lambda: len(os.listdir(f"/proc/{service.process.pid}/fd")) <= descriptors)
        assert service.end() == ""


def test_the_dashboard_asks_for_metrics_that_exist(place: Path) -> None:
    """All of them, also those that only a mount has, or only a target in files."""
    ports = free_port(), free_port()
    with (
        serving("-t", f"file:{place}/target", "--metrics", str(ports[0])) as service,
        mounting(service.address, place, f"metrics={ports[1]}") as mount,
    ):
        (mount.path / "file").write_bytes(bytes(100_000))
        with pytest.raises(FileNotFoundError):
            (mount.path / "none").read_bytes()
        with pytest.raises(OSError, match="Not a directory"):
            os.rmdir(mount.path / "file")
        names: set[str] = set()
        labels: dict[str, set[str]] = {}
        for port in ports:
            for name, pairs in samples(port):
                names.add(name)
                labels.setdefault(name, {"instance"}).update(dict(pairs))
        found = samples(ports[1])
        assert value(found, "warabi_mount_transferred_bytes_total", operation="write") == 100_000
    dashboard = json.loads((ROOT / "docs" / "grafana.json").read_text())
    queries = [target["expr"] for panel in dashboard["panels"] for target in panel["targets"]]
    asked = {name for query in queries for name in re.findall(r"\b(?:warabi|process)_\w+", query)}
    assert len(asked) > 15
    assert asked - names == set()
    for query in queries:
        (by,) = re.findall(r"by \(([^)]*)\)", query)[:1] or [""]
        for name in re.findall(r"\b(?:warabi|process)_\w+", query):
            assert set(by.replace(",", " ").split()) <= labels[name], query
    documented = (ROOT / "docs" / "monitoring.md").read_text()
    own = {re.sub("_(bucket|count|sum)$", "", name) for name in names if name.startswith("warabi")}
    assert {name for name in own if f"`{name}`" not in documented} == set()


def test_a_request_that_is_none() -> None:
    with server() as port:
        assert get(port)[1] == "hello"
        assert get(port, method="HEAD") == (200, "")
        assert get(port, "/other") == (404, "404 Not Found: there are: /metrics\n")
        assert get(port, method="POST")[0] == 405
        assert get(port, Host="evil.example")[0] == 403
        assert get(port, Host="localhost:1")[0] == get(port, Host="[::1]:1")[0] == 200
        for garbage in (
            b"\0\xff\r\n\r\n",
            b"GET\r\n\r\n",
            b"GET / HTTP/9.9\r\n\r\n",
            b"G" * 70_000,
        ):
            with (
                socket.create_connection(("127.0.0.1", port), PATIENCE) as connection,
                contextlib.suppress(ConnectionError),
            ):
                connection.sendall(garbage)
                connection.shutdown(socket.SHUT_WR)
                while connection.recv(4096):
                    pass
        assert get(port)[0] == 200


def test_silent_peers_are_limited_and_ended(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("warabi.monitoring.http.HTTP_PATIENCE", 0.5)
    with server() as port, contextlib.ExitStack() as stack:
        silent = [
            stack.enter_context(socket.create_connection(("127.0.0.1", port), PATIENCE))
            for _ in range(100)
        ]
        for connection in silent:
            with contextlib.suppress(ConnectionError):
                assert connection.recv(1) == b""
        assert get(port)[0] == 200


def test_tokens() -> None:
    security = Security(token=TOKEN.encode(), read_only_token=b"only for reading it")
    with server(security) as port:
        assert get(port)[0] == 401
        assert get(port, Authorization="Bearer wrong")[0] == 401
        assert get(port, Authorization=f"Digest {TOKEN}")[0] == 401
        assert get(port, Authorization="Basic %%%")[0] == 401
        assert get(port, Authorization=f"Bearer {TOKEN}")[0] == 200
        assert get(port, Authorization="Bearer only for reading it", Host="any.example")[0] == 200
        basic = base64.b64encode(f"user:{TOKEN}".encode()).decode()
        assert get(port, Authorization=f"Basic {basic}")[0] == 200


def test_tls_needs_a_certificate_of_both_sides(tmp_path: Path) -> None:
    authority = trustme.CA()
    files = {name: tmp_path / name for name in ("server", "client", "other")}
    for path in files.values():
        path.mkdir()
    own = tls_config(files["server"], authority)["tls"]
    port = free_port()
    options = [
        part
        for option, key in (("cert", "certificate"), ("key", "key"), ("ca", "ca"))
        for part in (f"--tls-{option}", own[key])
    ]

    def context(config: dict[str, str]) -> ssl.SSLContext:
        made = ssl.create_default_context(cafile=own["ca"])
        made.load_cert_chain(config["certificate"], config["key"])
        return made

    with serving("-t", "memory:", "--metrics", f"0.0.0.0:{port}", *options) as service:
        assert service.address
        accepted = context(tls_config(files["client"], authority)["tls"])
        assert "warabi_target_up" in get(port, tls=accepted)[1]
        for refused in (
            context(tls_config(files["other"])["tls"]),
            ssl.create_default_context(cafile=own["ca"]),
        ):
            with pytest.raises(OSError, match=r"."):
                get(port, tls=refused)
        with pytest.raises((OSError, http.client.HTTPException)):
            get(port)
        assert get(port, tls=accepted)[0] == 200
        service.end()


def test_places_where_it_cannot_be_served(place: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        said = fails("serve", "-t", "memory:", "--metrics", f"127.0.0.1:{port}")
        assert (
            said == f"warabi: --metrics 127.0.0.1:{port}: cannot listen: Address already in use\n"
        )
        (place / "mnt").mkdir()
        option = f"metrics={port}"
        done = run(
            sys.executable, "-m", "warabifs.mount.main", "memory:", place / "mnt", "-o", option,
            check=False,
        )  # fmt: skip
        assert done.returncode == 1
        assert done.stderr == (
            f"mount.warabifs: option metrics={port}: cannot listen: Address already in use\n"
        )
    for where in ("", "host", "host:99999", "127.0.0.1:", "x://y:1", "[::1]", "1:2:3"):
        with pytest.raises(ConfigError, match=re.escape(f"--metrics {where}: expected HOST:PORT")):
            HttpServer("--metrics ", where, Security(), {})
    with pytest.raises(ConfigError, match="--metrics a b:1: Name or service not known"):
        HttpServer("--metrics ", "a b:1", Security(), {})
    for where in ("0.0.0.0:0", "[::]:0"):
        with pytest.raises(PermissionDenied, match="is not a loopback address; this needs TLS"):
            HttpServer("--metrics ", where, Security(token=TOKEN.encode()), {})
    HttpServer("--metrics ", "0.0.0.0:0", Security(insecure=True), {}).close()


def test_a_forked_child_does_not_keep_it() -> None:
    with server() as port:
        ready, leave = os.pipe(), os.pipe()
        child = os.fork()
        if child == 0:
            os.write(ready[1], b"x")
            os.read(leave[0], 1)
            os._exit(0)
        try:
            os.read(ready[0], 1)
            assert get(port)[0] == 200
        except BaseException:
            os.kill(child, signal.SIGKILL)
            raise
    try:
        with pytest.raises(OSError, match=r".") as refused:
            socket.create_connection(("127.0.0.1", port), PATIENCE)
        assert refused.value.errno == errno.ECONNREFUSED
    finally:
        os.write(leave[1], b"x")
        os.waitpid(child, 0)
        for end in (*ready, *leave):
            os.close(end)


def test_a_report_that_fails_is_one_answer(caplog: pytest.LogCaptureFixture) -> None:
    reports = [a_report()]
    port = free_port()
    with monitored(lambda: reports[0], list, Security(), metrics=str(port)):
        assert get(port)[0] == 200
        reports.clear()
        status, text = get(port)
        assert (status, text.count("\n")) == (503, 1)
        assert "no report could be made" in caplog.text
        reports.append(a_report())
        assert value(samples(port), "warabi_target_up", provider="0") == 0


def test_it_does_not_stop_the_loop(tmp_path: Path) -> None:
    """Requests are served while reports are made all the time."""
    port = free_port()
    with serving("-t", "memory:", "--metrics", str(port)) as service:
        address, done = service.address, threading.Event()

        def scrape() -> None:
            while not done.is_set():
                samples(port)

        scraper = threading.Thread(target=scrape)
        scraper.start()
        try:
            with Engine("na+sm", client, config={"share": False}) as engine:
                target = Client(engine).make_target_handle(address, 0)
                for _ in range(300):
                    target.create(1)
        finally:
            done.set()
            scraper.join()
        about = {"provider": "0", "operation": "create"}
        assert value(samples(port), "warabi_request_duration_seconds_count", **about) == 300
        assert "held" not in service.end()
