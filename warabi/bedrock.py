"""A complete service from one document, JSON or TOML, in the format of Mochi's Bedrock for Warabi.

    with Server("na+sm", {"providers": [{"name": "blobs", "type": "warabi", "config": {...}}]}):
        ...

Settings that apply only to Argobots, Mercury and shared libraries are accepted, returned by
``get_config()``, and logged as having no effect: a configuration for Bedrock can be used
unchanged.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Iterator
from typing import Annotated, Any

from pydantic import (
    AfterValidator,
    BaseModel,
    Field,
    StrictInt,
    StrictStr,
    WithJsonSchema,
)
from pydantic.json_schema import GenerateJsonSchema
from pydantic_core import PydanticCustomError

from warabi import errors
from warabi._core import config_keys
from warabi.engine import Address, Engine, server
from warabi.errors import ConfigError
from warabi.protocol import engine_settings
from warabi.server import Provider
from warabi.target.config import (
    Model,
    ProviderConfig,
    checked,
    read_file,
    refused_key,
)

log = logging.getLogger(__name__)


def _strings(value: Any) -> bool:
    return isinstance(value, list) and all(isinstance(item, str) for item in value)


def _libraries(value: Any) -> Any:
    if _strings(value) or (isinstance(value, dict) and _strings(list(value.values()))):
        return value
    raise PydanticCustomError("libraries", "expected an array of paths, or an object of them")


def _reference(value: Any) -> Any:
    if isinstance(value, str) or _strings(value):
        return value
    raise PydanticCustomError("dependency", "expected a name or an array of names")


def _pool(value: Any) -> Any:
    if isinstance(value, str) or type(value) is int:
        return value
    raise PydanticCustomError("pool", "expected a name or a number")


def _type(value: str) -> str:
    if value != "warabi":
        raise PydanticCustomError("type", f"{value!r} is not served here, only 'warabi' is")
    return value


def _section(value: Any) -> Any:
    if isinstance(value, dict | list):
        return value
    raise PydanticCustomError("section", "expected an object or an array")


_Section = Annotated[Any, AfterValidator(_section)]


def _margo(section: dict[str, Any]) -> dict[str, Any]:
    try:
        engine_settings.parse(section)
    except ConfigError as error:
        path, _, reason = str(error).removeprefix(config_keys.ENGINE).partition(": ")
        raise refused_key(path.removeprefix("."), reason) from None
    return section


class _Provider(Model):
    name: Annotated[StrictStr, Field(min_length=1)] | None = None
    type: Annotated[StrictStr, AfterValidator(_type), WithJsonSchema({"const": "warabi"})]
    provider_id: Annotated[StrictInt, Field(ge=0, le=65535)] | None = None
    pool: Annotated[Any, AfterValidator(_pool)] = None
    config: ProviderConfig = Field(default_factory=ProviderConfig)
    dependencies: dict[str, Annotated[Any, AfterValidator(_reference)]] = Field(
        default_factory=dict
    )
    tags: list[StrictStr] = Field(default_factory=list)


class _Service(Model):
    # For editors: where the schema of this document is.
    schema_: Any = Field(default=None, alias="$schema", exclude=True)
    margo: Annotated[
        dict[str, Any], AfterValidator(_margo), WithJsonSchema(engine_settings.SCHEMA)
    ] = Field(default_factory=dict)
    libraries: Annotated[Any, AfterValidator(_libraries)] = Field(default_factory=list)
    providers: list[_Provider] = Field(default_factory=list, max_length=65536)
    bedrock: dict[str, Any] = Field(default_factory=dict)
    clients: _Section = Field(default_factory=list)
    abt_io: _Section = Field(default_factory=list)
    mona: _Section = Field(default_factory=list)
    ssg: _Section = Field(default_factory=list)


def check(config: dict[str, Any]) -> list[str]:
    """Check the configuration of a service, and open nothing but the files of its secrets.

    Returns:
        The given keys that have no effect.

    Raises:
        ConfigError, PermissionDenied: as ``Server``.
    """
    settings = checked(_Service, config)
    _complete(settings.providers)
    return list(_without_effect(settings))


class _Schema(GenerateJsonSchema):
    """Without titles that only repeat the names of keys."""

    def field_title_should_be_set(self, schema: Any) -> bool:
        return False


def json_schema() -> dict[str, Any]:
    """Return the JSON Schema (draft 2020-12) of a service's configuration.

    It says nothing of what depends on files, or on more than one key.  Targets are those of the
    backends that come with this package.
    """
    found = _Service.model_json_schema(schema_generator=_Schema)
    found["$schema"] = "https://json-schema.org/draft/2020-12/schema"
    found["title"] = "The configuration of a Warabi service"
    return found


class Server:
    """An engine with the providers of a configuration.

    Args:
        address: where to listen, as for ``Engine``.
        config: dict or JSON text.  ``providers`` is an array of objects with ``type``
            (``"warabi"``), ``name`` (default ``warabi-<provider_id>``), ``provider_id`` (default:
            the first free one), ``config`` (the configuration of ``Provider``) and ``tags``;
            ``margo`` may have the settings of ``Engine``.  Other keys of Bedrock and Margo have
            no effect, which is logged as a warning, once for each.
        engine: settings of ``Engine`` that override those in ``margo``.

    Raises:
        ConfigError: a key that is unknown or of the wrong type, with its JSON path; a provider of
            another type; a duplicate name or ID; an address that cannot be used.
        TargetBusy, CorruptTarget, StorageError, StorageFull, PermissionDenied: a target could
            not be opened.  Those opened before are closed again.
    """

    def __init__(
        self,
        address: str,
        config: dict[str, Any] | str = "{}",
        engine: dict[str, Any] | None = None,
    ) -> None:
        self._settings = settings = checked(_Service, config)
        _complete(settings.providers)
        for key in _without_effect(settings):
            log.warning("configuration: $.%s is accepted but has no effect", key)
        self._engine = Engine(address, server, config={**settings.margo, **(engine or {})})
        self._providers: dict[str, Provider] = {}
        try:
            for provider in settings.providers:
                self._open(provider)
        except BaseException:
            self._engine.finalize()
            raise

    @classmethod
    def from_config_file(
        cls,
        address: str,
        path: str | os.PathLike[str],
        engine: dict[str, Any] | None = None,
    ) -> Server:
        """The same as ``Server(address, config, engine)``, with the configuration from a file: TOML
        if its name ends with ``.toml``, otherwise JSON.

        Raises:
            ConfigError: it cannot be read; otherwise as ``Server``.
        """
        return cls(address, read_file(path), engine)

    def _open(self, settings: _Provider) -> None:
        assert settings.name is not None
        assert settings.provider_id is not None
        config = settings.config.model_dump(exclude_none=True)
        try:
            provider = Provider(self._engine, settings.provider_id, config)
        except errors.PathError:
            raise
        except errors.Exception as error:
            raise type(error)(f"provider {settings.name!r}: {error}") from error
        self._providers[settings.name] = provider

    @property
    def engine(self) -> Engine:
        """The engine that serves the providers."""
        return self._engine

    @property
    def address(self) -> Address:
        """The address for clients; ``str()`` returns the text for other processes."""
        return self._engine.addr()

    @property
    def providers(self) -> dict[str, Provider]:
        """The providers by name, in the order of the configuration."""
        return dict(self._providers)

    def get_config(self) -> dict[str, Any]:
        """The effective configuration: names, IDs and each provider's defaults filled in."""
        secrets = {"margo": {"token", "read_only_token"}}
        found = self._settings.model_dump(exclude_none=True, exclude_defaults=True, exclude=secrets)
        found["providers"] = [
            {
                **settings.model_dump(exclude_none=True, exclude={"config"}),
                "config": self._providers[str(settings.name)].get_config(),
            }
            for settings in self._settings.providers
        ]
        return found

    def finalize(self) -> None:
        """Complete pending requests, then close every provider; nothing is deleted.  Idempotent."""
        self._engine.finalize()

    def wait_for_finalize(self) -> None:
        """Return when it is finalized: by another thread or process, SIGINT or SIGTERM."""
        self._engine.wait_for_finalize()

    def __enter__(self) -> Server:
        return self

    def __exit__(self, *exc: object) -> None:
        self.finalize()

    def __repr__(self) -> str:
        return f"Server({str(self._engine.addr())!r}, providers={list(self._providers)})"


def _complete(providers: list[_Provider]) -> None:
    """Assign missing names and IDs to providers; reject duplicates."""
    ids: dict[int, int] = {}
    for i, provider in enumerate(providers):
        if provider.provider_id is not None:
            first = ids.setdefault(provider.provider_id, i)
            _distinct(first, i, "provider_id", provider.provider_id)
    free = (number for number in range(65536) if number not in ids)
    names: dict[str, int] = {}
    for i, provider in enumerate(providers):
        if provider.provider_id is None:
            provider.provider_id = next(free)
        if provider.name is None:
            provider.name = f"warabi-{provider.provider_id}"
        _distinct(names.setdefault(provider.name, i), i, "name", provider.name)


def _distinct(first: int, i: int, key: str, value: object) -> None:
    if first != i:
        raise ConfigError(
            f"configuration: $.providers[{i}].{key}: {value!r} is already used by"
            f" $.providers[{first}]"
        )


def _without_effect(settings: _Service) -> Iterator[str]:
    """Yield the given keys that have no effect, each once."""
    for key in sorted(settings.margo.keys() & config_keys.MARGO):
        yield f"margo.{key}"
    for key in ("libraries", "bedrock", "clients", "abt_io", "mona", "ssg"):
        if getattr(settings, key):
            yield key
    for key in ("pool", "dependencies"):
        if any(getattr(provider, key) not in (None, {}) for provider in settings.providers):
            yield f"providers[].{key}"
    targets = [provider.config.target for provider in settings.providers]
    extra = {
        f"{name}.{key}"
        for target in targets
        if target is not None
        for name, value in target.config
        if isinstance(value, BaseModel)
        for key in value.model_extra or ()
    }
    for key in sorted(extra):
        yield f"providers[].config.target.config.{key}"


__all__ = ["Server"]
