"""The registry of backends, and validation of their records."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest

from warabi.backends import Backend, register, registry
from warabi.backends.file import BACKEND as FILE
from warabi.backends.memory import BACKEND as MEMORY
from warabi.backends.memory import MemoryStorage
from warabi.backends.settings import PathModel
from warabi.errors import ConfigError
from warabi.target.config import parse
from warabi.target.opening import open_target, recorded_backend


@pytest.fixture(autouse=True)
def table(monkeypatch: pytest.MonkeyPatch) -> None:
    """What a test registers is known only while it runs."""
    monkeypatch.setattr(registry, "_known", dict(registry._known))


def other(**changes: object) -> Backend:
    return dataclasses.replace(MEMORY, name="other", **changes)  # type: ignore[arg-type]


def test_each_name_leads_to_one_backend() -> None:
    named = [name for backend in registry.loaded() for name in backend.names]
    assert sorted(named) == sorted(set(named))
    assert all(registry.find(name) in registry.loaded() for name in named)
    assert all(issubclass(b.storage, object) and b.config for b in registry.loaded())
    assert registry.find("abtio") is FILE
    assert registry.find("no such") is None


def test_a_registered_backend_is_a_type_of_targets() -> None:
    text = {"target": {"type": "other", "config": {"capacity": 5}}}
    with pytest.raises(ConfigError, match=r"\$.target.type: 'other' is not one of 'memory', "):
        parse(text)
    register(other(aliases=("another",)))
    register(other(aliases=("another",)))  # once more does no harm
    target = parse(text).target
    assert target is not None
    assert target.path is None
    assert target.model_dump() == text["target"]
    with open_target(target) as opened:
        assert isinstance(opened._storage, MemoryStorage)
    with pytest.raises(ConfigError, match=r"\$.target.config.capacty: unknown key, did you mean"):
        parse({"target": {"type": "another", "config": {"capacty": 5}}})


@pytest.mark.parametrize(
    ("backend", "reason"),
    [
        (other(aliases=("memory",)), "is already registered"),
        (other(aliases=("type",)), "expected a name of small letters"),
        (other(aliases=("../x",)), "expected a name of small letters"),
        (other(config=FILE.config), "must derive from PathModel"),
        (other(existing=FILE.existing), "must derive from PathModel"),
        (
            dataclasses.replace(FILE, name="other", aliases=(), config=PathModel),
            "need create_if_missing",
        ),
    ],
)
def test_a_record_that_contradicts_itself_is_refused(backend: Backend, reason: str) -> None:
    with pytest.raises(ConfigError, match=reason):
        register(backend)
    assert registry.find("other") is None


def test_a_target_of_one_type_is_replaced_by_one_of_another(tmp_path: Path) -> None:
    """The regions of the former one go as well; a type that is not known is left alone."""
    register(dataclasses.replace(FILE, name="other", aliases=()))
    path = tmp_path / "target"
    config = {"path": str(path), "create_if_missing": True, "override_if_exists": True}
    for kind in ("other", "file"):
        target = parse({"target": {"type": kind, "config": config}}).target
        assert target is not None
        with open_target(target) as opened:
            assert opened.used == 0
            opened.create_and_write(b"x" * 100_000)
        assert recorded_backend(path) == kind
    target = parse({"target": {"type": "other", "config": config}}).target
    assert target is not None
    open_target(target).close()
    del registry._known["other"]
    target = parse({"target": {"type": "file", "config": config}}).target
    assert target is not None
    with pytest.raises(ConfigError, match="of type 'other', which is not known here"):
        open_target(target)
