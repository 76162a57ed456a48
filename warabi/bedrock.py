"""A complete service from one JSON document, in the format of Mochi's Bedrock for Warabi.

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
    ConfigDict,
    Field,
    StrictBool,
    StrictInt,
    StrictStr,
    model_validator,
)
from pydantic_core import PydanticCustomError

from warabi import errors
from warabi._core import config_keys
from warabi.engine import Address, Engine, server
from warabi.errors import ConfigError
from warabi.protocol.auth import KEYS
from warabi.server import Provider
from warabi.target.config import (
    Model,
    ProviderConfig,
    checked,
    refused_key,
    unknown_key,
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


class _Margo(Model):
    """The engine's settings.  Those of Margo may have any values, and no effect."""

    model_config = ConfigDict(extra="allow")

    timeout: float | None = Field(default=None, strict=True, gt=0, le=1e9)
    insecure: StrictBool | None = None
    share: StrictBool | None = None
    # Validated by the engine.
    tls: dict[str, Any] | None = None
    limits: dict[str, Any] | None = None
    token_file: StrictStr | None = None
    read_only_token_file: StrictStr | None = None
    # Not included in the configuration that is reported.
    token: StrictStr | None = Field(default=None, exclude=True)
    read_only_token: StrictStr | None = Field(default=None, exclude=True)

    @model_validator(mode="after")
    def _known(self) -> _Margo:
        for key in self.model_extra or ():
            if key not in config_keys.MARGO:
                raise unknown_key(key, type(self).model_fields)
        if path := config_keys.misplaced(self.model_extra or {}):
            section, key = path.split(".")
            raise refused_key(path, f"has no effect in {section}; move it one level up")
        return self

    def engine(self) -> dict[str, Any]:
        """The configuration for ``Engine``."""
        # Null is not the same as a missing key: Engine rejects it.
        return {
            key: getattr(self, key)
            for key in ("timeout", "share", "limits", *KEYS)
            if key in self.model_fields_set
        }


class _Provider(Model):
    name: Annotated[StrictStr, Field(min_length=1)] | None = None
    type: Annotated[StrictStr, AfterValidator(_type)]
    provider_id: Annotated[StrictInt, Field(ge=0, le=65535)] | None = None
    pool: Annotated[Any, AfterValidator(_pool)] = None
    config: ProviderConfig = Field(default_factory=ProviderConfig)
    dependencies: dict[str, Annotated[Any, AfterValidator(_reference)]] = Field(
        default_factory=dict
    )
    tags: list[StrictStr] = Field(default_factory=list)


class _Service(Model):
    margo: _Margo = Field(default_factory=_Margo)
    libraries: Annotated[Any, AfterValidator(_libraries)] = Field(default_factory=list)
    providers: list[_Provider] = Field(default_factory=list, max_length=65536)
    bedrock: dict[str, Any] = Field(default_factory=dict)
    clients: _Section = Field(default_factory=list)
    abt_io: _Section = Field(default_factory=list)
    mona: _Section = Field(default_factory=list)
    ssg: _Section = Field(default_factory=list)


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
        self._engine = Engine(address, server, config={**settings.margo.engine(), **(engine or {})})
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
        """The same as ``Server(address, config, engine)``, with the configuration from a file.

        Raises:
            ConfigError: it cannot be read; otherwise as ``Server``.
        """
        try:
            with open(path, encoding="utf-8") as file:
                text = file.read()
        except (OSError, UnicodeError) as error:
            reason = getattr(error, "strerror", None) or error
            raise ConfigError(f"configuration {os.fspath(path)}: {reason}") from None
        return cls(address, text, engine)

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
        found = self._settings.model_dump(exclude_none=True, exclude_defaults=True)
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
    for key in sorted(settings.margo.model_extra or ()):
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
