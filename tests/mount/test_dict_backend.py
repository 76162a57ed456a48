"""A backend of another package: it keeps the contract, and is mounted and served by its name."""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.mount.support import mounting, run
from tests.support.helpers import ROOT
from warabi.backends import Storage, registry
from warabi.errors import ConfigError
from warabi.region import RegionID
from warabi.testing import StorageTests
from warabifs.mount.options import parse_source

EXAMPLE = ROOT / "examples" / "dict_backend.py"


def example() -> Any:
    """The example's module."""
    spec = importlib.util.spec_from_file_location("dict_backend", EXAMPLE)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


class TestDict(StorageTests):
    @pytest.fixture
    def storage(self) -> Iterator[Storage]:
        made: Storage = example().DictStorage()
        yield made
        made.close()

    def raw_get(self, storage: Any, rid: RegionID, size: int) -> bytes:
        return bytes(storage._regions[rid][:size])

    def raw_set(self, storage: Any, rid: RegionID, data: bytes) -> None:
        storage._regions[rid][: len(data)] = data


def test_a_backend_needs_few_lines() -> None:
    assert len(EXAMPLE.read_text().splitlines()) <= 60


@pytest.fixture
def package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A directory of packages where the example is installed, with its entry point."""
    site = tmp_path / "site"
    site.mkdir()
    (site / "dict_backend.py").write_text(EXAMPLE.read_text())
    meta = site / "warabi_dict_backend-1.dist-info"
    meta.mkdir()
    (meta / "METADATA").write_text("Metadata-Version: 2.1\nName: warabi-dict-backend\nVersion: 1\n")
    (meta / "entry_points.txt").write_text(
        "[warabi.backends]\ndict = dict_backend:BACKEND\nbroken = dict_backend:NOTHING\n"
    )
    monkeypatch.setenv("PYTHONPATH", str(site))
    monkeypatch.syspath_prepend(str(site))
    monkeypatch.setattr(registry, "_known", dict(registry._known))
    yield site
    sys.modules.pop("dict_backend", None)


@pytest.mark.timeout(60)
def test_a_backend_of_another_package_is_mounted(package: Path, place: Path) -> None:
    with mounting("dict:", place) as mount:
        (mount.path / "file").write_bytes(b"x" * 100_000)
        assert (mount.path / "file").read_bytes() == b"x" * 100_000
        assert f"dict: {mount.path} " in Path("/proc/self/mounts").read_text()
        assert mount.unmount() == 0


def test_a_source_names_what_packages_announce(package: Path) -> None:
    assert "dict" not in [backend.name for backend in registry.loaded()]
    source = parse_source("dict:", create=True)
    assert source.backend is registry.find("dict")
    with pytest.raises(ConfigError, match=r"broken.*cannot be loaded"):
        parse_source("broken:", create=True)
    with pytest.raises(ConfigError, match="dict: and nothing after it"):
        parse_source("dict:/path", create=True)


def test_a_process_with_more_rights_than_its_user_knows_no_packages(
    package: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("os.geteuid", lambda: 12345)
    assert registry.find("dict") is None
    with pytest.raises(
        ConfigError, match="expected memory:, file:/path/of/the/target, rados:POOL/NAME, or"
    ):
        parse_source("dict:", create=True)


def test_size_is_refused_for_a_backend_of_another_package(package: Path, place: Path) -> None:
    (place / "mnt").mkdir()
    command = [sys.executable, "-m", "warabifs.mount.main", "dict:", str(place / "mnt")]
    done = run(*command, "-o", "size=1m", check=False)
    assert done.returncode == 1
    assert "option size: only for memory:" in done.stderr
