"""Services from Bedrock's JSON."""

from __future__ import annotations

import json
import logging
import tomllib
from pathlib import Path
from typing import Any

import pytest
from jsonschema import Draft202012Validator

from tests.support.helpers import MEMORY, ROOT, file_config, run_python
from warabi import errors
from warabi._core import config_keys
from warabi.bedrock import Server, check, json_schema
from warabi.client import Client
from warabi.engine import Engine, client
from warabi.errors import ConfigError
from warabi.protocol import engine_settings

WARABI: dict[str, Any] = {"type": "warabi", "config": MEMORY}


def service(*providers: dict[str, Any], **keys: Any) -> dict[str, Any]:
    return {"providers": [{**WARABI, **provider} for provider in providers], **keys}


@pytest.mark.parametrize("as_text", [False, True])
def test_several_providers_and_targets(
    as_text: bool, tmp_path: Path, client_engine: Engine
) -> None:
    config: Any = service(
        {"name": "scratch", "provider_id": 7},
        {"name": "archive", "provider_id": 3, "config": file_config(tmp_path / "a")},
        {"name": "none", "provider_id": 65535, "config": {}},
    )
    with Server("na+sm", json.dumps(config) if as_text else config) as server:
        assert {name: p.provider_id for name, p in server.providers.items()} == {
            "scratch": 7, "archive": 3, "none": 65535,
        }  # fmt: skip
        assert all(server.providers.values())
        assert server.address == server.engine.addr()
        client = Client(client_engine)
        for provider_id in (7, 3):
            target = client.make_target_handle(str(server.address), provider_id)
            region = target.create_and_write(b"data", persist=True)
        with pytest.raises(errors.TargetNotFound):
            client.make_target_handle(str(server.address), 65535).create(1)
    assert not any(server.providers.values())
    server.finalize()
    with Server("na+sm", config) as server:
        target = Client(client_engine).make_target_handle(str(server.address), 3)
        assert target.read(region, 0, 4) == b"data"


def test_ids_and_names_that_are_not_given() -> None:
    config = service({}, {"provider_id": 0, "name": "first"}, {"name": "x"}, {"provider_id": 2}, {})
    with Server("na+sm", config) as server:
        found = [(name, provider.provider_id) for name, provider in server.providers.items()]
    assert found == [("warabi-1", 1), ("first", 0), ("x", 3), ("warabi-2", 2), ("warabi-4", 4)]


def test_nothing_to_serve() -> None:
    configs: list[Any] = [{}, "", "{}", {"providers": []}]
    for config in configs:
        with Server("na+sm", config) as server:
            assert server.providers == {}
            assert server.get_config() == {"providers": []}


def test_get_config_can_be_given_again(tmp_path: Path) -> None:
    config = service(
        {"tags": ["fast"], "pool": "p", "dependencies": {"a": "b", "c": ["d"]}},
        {"config": file_config(tmp_path / "target")},
        margo={"timeout": 5, "argobots": {"pools": []}},
        libraries={"warabi": "libwarabi-bedrock-module.so"},
    )
    with Server("na+sm", config) as server:
        found = server.get_config()
    assert found["margo"] == {"timeout": 5, "argobots": {"pools": []}}
    assert found["providers"][0]["tags"] == ["fast"]
    assert found["providers"][0]["provider_id"] == 0
    assert found["providers"][1]["config"]["target"]["config"]["override_if_exists"] is False
    with Server("na+sm", json.dumps(found)) as server:
        assert server.get_config() == found


def test_what_has_no_effect_is_reported_once_each(caplog: pytest.LogCaptureFixture) -> None:
    config = service(
        {"name": "a", "pool": "__primary__", "dependencies": {"pool": "p"}, "tags": ["t"]},
        {"name": "b", "pool": 0, "dependencies": {}},
        margo={"use_progress_thread": True, "mercury": {"address": "na+sm"}, "timeout": 10},
        libraries=["libwarabi-bedrock-module.so"],
        bedrock={"pool": "__primary__"},
        abt_io=[{"name": "io"}],
        ssg={"name": "group"},
        clients=[{"name": "client", "type": "yokan"}],
        mona=[],
    )
    with caplog.at_level(logging.WARNING), Server("na+sm", config):
        pass
    reported = [record.getMessage() for record in caplog.records]
    keys = [message.split("$.")[1].split()[0] for message in reported]
    assert sorted(keys) == [
        "abt_io", "bedrock", "clients", "libraries", "margo.mercury", "margo.use_progress_thread",
        "providers[].dependencies", "providers[].pool", "ssg",
    ]  # fmt: skip


def test_engine_settings() -> None:
    config: dict[str, Any] = {"margo": {"timeout": 0.25, "deadline": 9}}
    with Server("na+sm", config) as server:
        assert json.loads(Client(server.engine).get_config()) == {"timeout": 0.25, "deadline": 9.0}
    with pytest.raises(errors.PermissionDenied):
        Server("tcp://0.0.0.0", {})
    with Server("tcp://0.0.0.0", {"margo": {"insecure": True}}):
        pass
    with Server("na+sm", config, {"timeout": 0.5}) as server:
        assert json.loads(Client(server.engine).get_config()) == {"timeout": 0.5, "deadline": 9.0}


def test_engine_settings_for_security(
    tls: dict[str, Any], caplog: pytest.LogCaptureFixture
) -> None:
    secrets = {"token": "a token of this service", "read_only_token": "a token for readers"}
    shown = {**tls, "limits": {"connections": 3}}
    provider = {"name": "a", "type": "warabi", "provider_id": 1, "config": MEMORY}
    config = {"margo": {**shown, **secrets}, "providers": [provider]}
    with (
        Server("tcp://0.0.0.0", config) as server,
        Engine("tcp", client, config={**tls, "token": secrets["read_only_token"]}) as own,
    ):
        address = str(server.address).replace("0.0.0.0", "127.0.0.1")
        handle = Client(own).make_target_handle(address, 1)
        with pytest.raises(errors.PermissionDenied, match="read-only"):
            handle.create(1)
        assert server.get_config()["margo"] == shown, "secrets are shown, or others are not"
    assert "has no effect" not in caplog.text


TOML = """
"$schema" = "service.schema.json"
[margo]
timeout = 5
[[providers]]
type = "warabi"
name = "ö"
[providers.config.target]
type = "memory"
"""
TARGET = "$.providers[0].config.target"
WRONG: dict[str, tuple[Any, str]] = {
    "no JSON": ("{", "not valid JSON"),
    "an array": ("[]", "$: expected an object"),
    "a number": ("1", "$: expected an object"),
    "unknown key": ({"provider": []}, "$.provider: unknown key"),
    "providers no array": ({"providers": {}}, "$.providers: "),
    "provider no object": ({"providers": ["warabi"]}, "$.providers[0]: expected an object"),
    "unknown key of a provider": (service({}, {"id": 1}), "$.providers[1].id: unknown key"),
    "no type": ({"providers": [{"name": "a"}]}, "$.providers[0].type: required key is missing"),
    "another type": (service({"type": "yokan"}), "$.providers[0].type: 'yokan' is not served"),
    "type no text": (service({"type": 1}), "$.providers[0].type: "),
    "name no text": (service({"name": 1}), "$.providers[0].name: "),
    "name empty": (service({"name": ""}), "$.providers[0].name: "),
    "ID too large": (service({"provider_id": 65536}), "$.providers[0].provider_id: "),
    "ID negative": (service({"provider_id": -1}), "$.providers[0].provider_id: "),
    "ID text": (service({"provider_id": "1"}), "$.providers[0].provider_id: "),
    "ID truth": (service({"provider_id": True}), "$.providers[0].provider_id: "),
    "pool": (service({"pool": 1.5}), "$.providers[0].pool: expected a name or a number"),
    "dependencies": (service({"dependencies": []}), "$.providers[0].dependencies: expected an obj"),
    "dependency": (service({"dependencies": {"a": {}}}), "$.providers[0].dependencies.a: expected"),
    "tags": (service({"tags": "a"}), "$.providers[0].tags: "),
    "tag": (service({"tags": ["a", 1]}), "$.providers[0].tags[1]: "),
    "config no object": (service({"config": "memory"}), "$.providers[0].config: expected an obj"),
    "targets of old": (service({"config": {"targets": []}}), "$.providers[0].config.targets: unkn"),
    "target type": (service({"config": {"target": {"type": "x"}}}), f"{TARGET}.type: 'x' is not"),
    "target key": (
        service({"config": {"target": {"type": "memory", "config": {"capacity": "1"}}}}),
        f"{TARGET}.config.capacity: ",
    ),
    "margo": ({"margo": []}, "$.margo: expected an object"),
    "timeout": ({"margo": {"timeout": "1"}}, "$.margo.timeout: "),
    "timeout of no time": ({"margo": {"timeout": 0}}, "$.margo.timeout: "),
    "insecure": ({"margo": {"insecure": 1}}, "$.margo.insecure: "),
    "mistyped": (
        {"margo": {"tokenfile": "x"}},
        "$.margo.tokenfile: unknown key, did you mean token_file?",
    ),
    "null": ({"margo": {"token_file": None}}, "$.margo.token_file: None is not a path"),
    "key of the engine in a section of Margo's": (
        {"margo": {"mercury": {"address": "na+sm", "token_file": "/x"}}},
        "$.margo.mercury.token_file: has no effect in mercury",
    ),
    "mistyped limit": (
        {"margo": {"limits": {"request": 5}}},
        "$.margo.limits.request: unknown key, did",
    ),
    "mistyped setting": (
        service({"config": {"target": {"type": "memory", "config": {"capasity": 1}}}}),
        f"{TARGET}.config.capasity: unknown key, did you mean capacity?",
    ),
    "mistyped key of a provider": (
        service({"provider-id": 1}),
        "$.providers[0].provider-id: unknown key, did you mean provid",
    ),
    "mistyped abt_io": (
        service(
            {
                "config": {
                    "target": {
                        "type": "file",
                        "config": {"path": "x", "abt_io": {"backing_threads": 1}},
                    }
                }
            }
        ),
        f"{TARGET}.config.abt_io.backing_threads: unknown key, did you mean backing_thread_count?",
    ),
    "tls": ({"margo": {"tls": True}}, "$.margo.tls: "),
    "no certificate": ({"margo": {"tls": {}}}, "$.margo.tls.certificate: required key is missing"),
    "token": ({"margo": {"token": 5}}, "$.margo.token: "),
    "short token": ({"margo": {"token": "x"}}, "$.margo.token: a token of 1 bytes"),
    "limits": ({"margo": {"limits": {"connections": 0}}}, "$.margo.limits.connections: "),
    "libraries": ({"libraries": "x.so"}, "$.libraries: expected"),
    "library": ({"libraries": {"warabi": 1}}, "$.libraries: expected"),
    "ssg": ({"ssg": "group"}, "$.ssg: expected"),
    "same name": (
        service({"name": "a"}, {"name": "b"}, {"name": "a"}),
        "$.providers[2].name: 'a' is already used by $.providers[0]",
    ),
    "same name, of a default": (
        service({"name": "warabi-1", "provider_id": 0}, {}),
        "$.providers[1].name: 'warabi-1' is already used by $.providers[0]",
    ),
    "same ID": (
        service({}, {"provider_id": 5}, {"provider_id": 5}),
        "$.providers[2].provider_id: 5 is already used by $.providers[1]",
    ),
}


@pytest.mark.parametrize("name", WRONG)
def test_wrong_configurations(name: str) -> None:
    config, message = WRONG[name]
    with pytest.raises(ConfigError) as caught:
        Server("na+sm", config)
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


BEYOND_THE_SCHEMA = {
    "mistyped abt_io", "libraries", "library", "ssg", "pool", "dependency", "same ID", "same name",
    "same name, of a default", "key of the engine in a section of Margo's",
}  # fmt: skip


@pytest.fixture(scope="module")
def schema() -> Any:
    """Checks a document against the published schema."""
    published = json.loads((ROOT / "docs" / "service.schema.json").read_text())
    assert published == json_schema(), "run: warabi config schema > docs/service.schema.json"
    Draft202012Validator.check_schema(published)
    return Draft202012Validator(published)


@pytest.mark.parametrize("name", sorted(WRONG.keys() - BEYOND_THE_SCHEMA))
def test_the_schema_refuses_wrong_configurations(name: str, schema: Any) -> None:
    config = WRONG[name][0]
    assert name == "no JSON" or not schema.is_valid(
        json.loads(config) if isinstance(config, str) else config
    )


def test_the_schema_accepts_configurations(tmp_path: Path, schema: Any) -> None:
    tls = {key: str(tmp_path / key) for key in ("certificate", "key", "ca")}
    engine = {
        "timeout": 0.5, "deadline": 9, "share": False, "insecure": True, "tls": tls,
        "token": "x" * 16, "read_only_token_file": "/f", "limits": {"requests": 3},
        "mercury": {"address": "na+sm"},
    }  # fmt: skip
    pmem = {"type": "pmdk", "config": {"path": "x", "create_if_missing_with_size": 1 << 24}}
    for config in (
        {},
        tomllib.loads(TOML),
        service({"config": file_config(tmp_path)}, {"config": {"target": pmem}}, margo=engine),
        service({"config": {}, "pool": "p", "tags": ["a"]}, libraries={"warabi": "x.so"}, ssg=[]),
    ):
        schema.validate(config)
    assert (
        schema.schema["properties"]["margo"]["properties"].keys()
        == engine_settings.KEYS | config_keys.MARGO
    )


def test_check_opens_nothing(tmp_path: Path) -> None:
    target = {"type": "file", "config": {"path": str(tmp_path / "t"), "create_if_missing": True}}
    config = service({"config": {"target": target}, "pool": "p"}, margo={"mercury": {}})
    assert check(config) == ["margo.mercury", "providers[].pool"]
    assert not list(tmp_path.iterdir())
    with pytest.raises(ConfigError, match=r"\$\.providers\[1\]\.name: 'a' is already used"):
        check(service({"name": "a"}, {"name": "a"}))


def test_all_problems_of_a_configuration_are_reported() -> None:
    with pytest.raises(ConfigError, match=r"margo\.share.*\[0\]\.pool.*\[1\]\.tags.*\$\.what"):
        Server("na+sm", service({"pool": []}, {"tags": 1}, what=1, margo={"share": 1}))


def test_wrong_address() -> None:
    with pytest.raises(ConfigError, match="address"):
        Server("carrier pigeon", {})


def test_a_provider_that_fails_closes_those_before_it(tmp_path: Path) -> None:
    good, bad = tmp_path / "good", tmp_path / "bad"
    bad.write_text("something else")
    config = service(
        {"name": "first", "config": file_config(good)}, {"name": "2nd", "config": file_config(bad)}
    )
    with pytest.raises(ConfigError, match=r"provider '2nd': target .*bad: .* not a warabi target"):
        Server("na+sm", config)
    assert bad.read_text() == "something else"
    with Server("na+sm", service({"config": file_config(good)})):  # it is free again
        pass


def test_two_providers_of_one_target(tmp_path: Path) -> None:
    provider = {"config": file_config(tmp_path / "target")}
    config = service(provider, provider)
    with pytest.raises(errors.TargetBusy, match="provider 'warabi-1'"):
        Server("na+sm", config)


def test_nothing_is_opened_when_something_is_wrong(tmp_path: Path) -> None:
    config = service({"config": file_config(tmp_path / "target")}, {"provider_id": "x"})
    with pytest.raises(ConfigError):
        Server("na+sm", config)
    assert not list(tmp_path.iterdir())


def test_from_a_file(tmp_path: Path) -> None:
    path = tmp_path / "service.json"
    path.write_text(json.dumps(service({"name": "ö"})), encoding="utf-8")
    with Server.from_config_file("na+sm", path) as server:
        assert list(server.providers) == ["ö"]
    toml = tmp_path / "service.toml"
    toml.write_text(TOML, encoding="utf-8")
    with Server.from_config_file("na+sm", toml) as server:
        assert server.get_config()["margo"] == {"timeout": 5}
        assert list(server.providers) == ["ö"]
    path.write_bytes(b"\xff")
    toml.write_text("= 1")
    for wrong in (path, toml, tmp_path, tmp_path / "missing"):
        with pytest.raises(ConfigError, match=str(wrong)):
            Server.from_config_file("na+sm", wrong)


@pytest.mark.parametrize(
    "send",
    [
        "os.kill(os.getpid(), signal.SIGTERM)",
        "signal.pthread_kill(threading.get_ident(), signal.SIGTERM)",  # interrupts no other thread
        "server.finalize()",
    ],
)
def test_wait_for_finalize(send: str) -> None:
    done = run_python(
        "import os, signal, threading, time\n"
        "from warabi.bedrock import Server\n"
        "server = Server('na+sm', {})\n"
        "before = signal.getsignal(signal.SIGINT)\n"
        "def send():\n"
        "    while signal.getsignal(signal.SIGINT) is before:  # it does not wait yet\n"
        "        time.sleep(0.001)\n"
        f"    {send}\n"
        "threading.Thread(target=send).start()\n"
        "server.wait_for_finalize()\n"
        "print(server.engine.listening)\n"
    )
    assert (done.returncode, done.stdout, done.stderr) == (0, "False\n", "")
