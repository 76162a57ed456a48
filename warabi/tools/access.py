"""How commands access a target: through a provider, or by its path, opening it exclusively."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from warabi.client import Client, TargetHandle
from warabi.engine import Engine, Mode
from warabi.errors import ConfigError
from warabi.in_process.link import DirectLink, Link
from warabi.protocol.auth import config_of
from warabi.tools.location import parse

if TYPE_CHECKING:
    from warabi.target.target import Target


def is_served(where: str) -> bool:
    """Whether *where* leads to a target that an engine serves."""
    return bool(parse(where).address)


@contextmanager
def client_engine(address: str, security: dict[str, str]) -> Iterator[Engine]:
    """An engine for connections to *address*, for the duration of the block; *security* is as for
    :func:`warabi.protocol.auth.config_of`."""
    with Engine(address.split("://")[0], Mode.CLIENT, config=config_of(security)) as engine:
        yield engine


@contextmanager
def handle(
    address: str, provider_id: int, security: dict[str, str], *, read_only: bool = False
) -> Iterator[TargetHandle]:
    """A handle of a provider's target, for the duration of the block."""
    with client_engine(address, security) as engine:
        yield Client(engine).make_target_handle(address, provider_id, read_only)


@contextmanager
def served(
    address: str, provider_id: int, security: dict[str, str] | None = None
) -> Iterator[Link]:
    """A link to a provider's target, for the duration of the block."""
    with handle(address, provider_id, security or {}) as target:
        yield target.link


@contextmanager
def owned(path: Path, **settings: Any) -> Iterator[Link]:
    """Open the target at *path* exclusively, whatever its type, for the duration of the block.

    Raises:
        ConfigError: there is none.
        TargetBusy: it is already open.
    """
    with _direct(_opened(str(path).removeprefix("file:"), settings)) as link:
        yield link


@contextmanager
def _direct(target: Target) -> Iterator[Link]:
    from warabi.provider.core import ProviderCore

    core = ProviderCore(0, target)
    try:
        yield DirectLink(core)
    finally:
        core.close()


def _opened(path: str, settings: dict[str, Any]) -> Target:
    from warabi.backends import registry
    from warabi.target import opening
    from warabi.target.config import checked

    kind, colon, place = path.partition(":")
    if colon and (found := registry.find(kind)) and found.spelling is not None:
        spelled = found.spelled_settings(place, create=False)
        return opening.open_backend(
            found, checked(found.config, {**spelled, **settings}, what=path)
        )
    failure: ConfigError | None = None
    for backend in registry.every():
        if backend.files and settings.keys() <= backend.config.model_fields.keys():
            try:
                config = backend.config.model_validate({"path": path, **settings})
                return opening.open_backend(backend, config)
            except ConfigError as error:
                failure = failure or error
    assert failure is not None  # backends with files support every setting that commands pass
    raise failure


@contextmanager
def made_or_reached(
    where: str, provider_id: int, security: dict[str, str], pmem_size: int | None
) -> Iterator[Link]:
    """The same as :func:`reached`, but creates a missing target at a path, and removes it again if
    the block fails, except one in a pool.  *pmem_size* makes it one of persistent memory, of that
    many bytes."""
    if parse(where).pooled:
        with owned(Path(where), create_if_missing=True) as link:
            yield link
        return
    path = Path(where.removeprefix("file:"))
    if is_served(where) or (path.exists() and path.stat().st_size):
        with reached(where, provider_id, security) as link:
            yield link
        return
    from warabi.target import opening
    from warabi.target.config import FileConfig, PmemConfig

    if pmem_size is None:
        target = opening.open_file(FileConfig(path=str(path), create_if_missing=True))
    else:
        pmem = PmemConfig(path=str(path), create_if_missing_with_size=pmem_size)
        target = opening.open_pmem(pmem)
    with _direct(target) as link:
        try:
            yield link
        except BaseException:
            path.unlink()  # closing a target without a catalogue removes the rest
            raise


@contextmanager
def reached(
    where: str, provider_id: int, security: dict[str, str], **settings: Any
) -> Iterator[Link]:
    """A link to the target that :func:`warabi.tools.location.parse` finds; settings are for the
    backend of one that no engine serves.

    Raises:
        ConfigError: *where* leads to a path in a target.
    """
    location = parse(where, provider_id).in_target()
    if location.path.strip("/"):
        raise ConfigError(f"{where}: names a path in a target, expected the target itself")
    if location.address:
        with served(location.address, location.provider_id, security) as link:
            yield link
    else:
        with owned(Path(location.file), **settings) as link:
            yield link
