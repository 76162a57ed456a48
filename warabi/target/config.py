"""Configuration of a provider, validated by pydantic.  Not imported by clients, as it is slow."""

from __future__ import annotations

import functools
import json
import os
import tomllib
from collections.abc import Collection
from typing import Annotated, Any, Literal, Self, TypeVar, Union, get_args

from pydantic import (
    BaseModel,
    Field,
    GetJsonSchemaHandler,
    ModelWrapValidatorHandler,
    SerializeAsAny,
    StrictBool,
    StrictInt,
    StrictStr,
    TypeAdapter,
    ValidationError,
    create_model,
    model_validator,
)

from warabi._core import config_keys
from warabi.backends import Backend, registry
from warabi.backends.file import FileConfig as FileConfig
from warabi.backends.memory import MemoryConfig as MemoryConfig
from warabi.backends.pmem import PmemConfig as PmemConfig
from warabi.backends.settings import Bytes as Bytes
from warabi.backends.settings import Model as Model
from warabi.backends.settings import PathModel, Positive
from warabi.backends.settings import refused_key as refused_key
from warabi.backends.settings import unknown_key as unknown_key
from warabi.errors import ConfigError

_AnyModel = TypeVar("_AnyModel", bound=BaseModel)


class TargetConfig(Model):
    """A target: one of the names of its backend, and that backend's settings.

    Validation returns an instance of the subclass for its backend.
    """

    type: str
    config: SerializeAsAny[Model]

    @property
    def backend(self) -> Backend:
        """The backend that ``type`` names."""
        found = registry.find(self.type)
        assert found is not None  # it was looked up when this was validated
        return found

    @property
    def path(self) -> str | None:
        """The path of the target, if it has one."""
        return self.config.path if isinstance(self.config, PathModel) else None

    @model_validator(mode="wrap")
    @classmethod
    def _of_its_backend(cls, data: Any, handler: ModelWrapValidatorHandler[Self]) -> Any:
        if cls is not TargetConfig or isinstance(data, TargetConfig):
            return handler(data)
        if isinstance(data, dict) and isinstance(kind := data.get("type"), str):
            registry.find(kind)  # which loads it, if it has to be
        return _target_types(tuple(registry.loaded())).validate_python(data)

    @classmethod
    def __get_pydantic_json_schema__(cls, core: Any, handler: GetJsonSchemaHandler) -> Any:
        """Describe a target of any backend that is built in."""
        if cls is TargetConfig:
            core = _target_types(tuple(registry.loaded())).core_schema
        return handler(core)


@functools.cache
def _target_model(backend: Backend) -> type[TargetConfig]:
    """The model of targets of one backend."""
    settings = backend.config
    required = any(field.is_required() for field in settings.model_fields.values())
    names: Any = Literal[backend.names]
    return create_model(
        f"{backend.name.capitalize()}Target",
        __base__=TargetConfig,
        type=(names, ...),
        config=(settings, ... if required else Field(default_factory=settings)),
    )


@functools.lru_cache(maxsize=1)
def _target_types(backends: tuple[Backend, ...]) -> TypeAdapter[TargetConfig]:
    models = tuple(_target_model(backend) for backend in backends)
    union: Any = Annotated[Union[models], Field(discriminator="type")]  # noqa: UP007
    return TypeAdapter(union)


class DefaultTransfer(Model):
    type: Literal["__default__"] = "__default__"
    config: Model = Field(default_factory=Model)


class PipelineConfig(Model):
    """Settings of the ``pipeline`` transfer manager, all required."""

    num_pools: Positive
    num_buffers_per_pool: Positive
    first_buffer_size: Positive
    buffer_size_multiplier: Annotated[StrictInt, Field(gt=1)]


class PipelineTransfer(Model):
    type: Literal["pipeline"]
    config: PipelineConfig


TransferConfig = Annotated[DefaultTransfer | PipelineTransfer, Field(discriminator="type")]


class MigrationConfig(Model):
    """Permissions of peers over the network: see ``provider/migration/permission.py``."""

    send: StrictBool = False
    receive: StrictBool = False
    root: Annotated[StrictStr, Field(min_length=1)] | None = None


class ProviderConfig(Model):
    """The configuration of ``Provider``: a target, or none yet, and a transfer manager."""

    target: SerializeAsAny[TargetConfig] | None = None
    migration: MigrationConfig | None = None
    transfer_manager: TransferConfig = Field(default_factory=DefaultTransfer)


def parse(config: dict[str, Any] | str | None) -> ProviderConfig:
    """Validate *config*; raises as :func:`checked`."""
    return checked(ProviderConfig, config)


def checked(
    model: type[_AnyModel],
    config: dict[str, Any] | str | None,
    *,
    what: str = "configuration",
    root: str = "$",
    hidden: tuple[str, ...] = (),
) -> _AnyModel:
    """Validate *config*, a dict or JSON text.

    Args:
        what: begins the message of an error.
        root: the JSON path of *config* in the user's configuration.
        hidden: top-level keys that the user did not write.

    Raises:
        ConfigError: invalid JSON, or a key that is unknown, missing or of the wrong type; the
            message gives its JSON path.
    """
    if isinstance(config, str):
        config = _parsed(config, what)
    try:
        return model.model_validate({} if config is None else config)
    except ValidationError as error:
        raise ConfigError(f"{what}: {_explain(model, error, root, hidden)}") from None


def read_file(path: str | os.PathLike[str]) -> dict[str, Any]:
    """Return what a file contains: TOML if its name ends with ``.toml``, otherwise JSON.

    Raises:
        ConfigError: it cannot be read, is not of its format, or is no object.
    """
    where = f"configuration {os.fspath(path)}"
    try:
        with open(path, encoding="utf-8") as file:
            text = file.read()
    except (OSError, UnicodeError) as error:
        raise ConfigError(f"{where}: {getattr(error, 'strerror', None) or error}") from None
    if os.fspath(path).endswith(".toml"):
        try:
            return tomllib.loads(text)
        except (tomllib.TOMLDecodeError, RecursionError) as error:
            raise ConfigError(f"{where}: not valid TOML: {error}") from None
    return _parsed(text, where)


def _parsed(text: str, where: str) -> dict[str, Any]:
    try:
        found = json.loads(text or "{}")
    except (json.JSONDecodeError, RecursionError) as error:
        raise ConfigError(f"{where}: not valid JSON: {error}") from None
    if not isinstance(found, dict):
        raise ConfigError(f"{where}: $: expected an object")
    return found


_UNIONS = ("target", "transfer_manager")


def _fields(model: type[BaseModel], location: tuple[int | str, ...]) -> Collection[str]:
    """Return the keys of the model at *location*, as given by pydantic, below *model*."""
    found = [model]
    for part in location:
        if isinstance(part, int):
            continue
        fields = [m.model_fields[part].annotation for m in found if part in m.model_fields]
        if fields:
            found = [below for field in fields for below in _models(field)]
        else:  # the tag of a union
            found = [m for m in found if part in get_args(m.model_fields["type"].annotation)]
    return {name for m in found for name in m.model_fields}


def _models(annotation: Any) -> list[type[BaseModel]]:
    """Return every model in an annotation."""
    if annotation is TargetConfig:
        return [_target_model(backend) for backend in registry.loaded()]
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return [annotation]
    return [model for part in get_args(annotation) for model in _models(part)]


def _explain(
    model: type[BaseModel], error: ValidationError, root: str, hidden: tuple[str, ...]
) -> str:
    """Return one line with the JSON path and the reason of every problem."""
    problems = []
    for item in error.errors(include_url=False):
        location = item["loc"]
        # A tagged union puts the tag into the path; the user's JSON does not have it.
        path = "".join(
            f"[{part}]" if isinstance(part, int) else f".{part}"
            for i, part in enumerate(location)
            if not (i and location[i - 1] in _UNIONS and part not in ("type", "config"))
            and not (i == 0 and part in hidden)
        )  # fmt: skip
        reason = item["msg"]
        if item["type"] == "extra_forbidden":
            reason = config_keys.unknown(location[-1], _fields(model, location[:-1]))
        elif item["type"] == "unknown_key":
            path += f".{item['ctx']['key']}"
        elif item["type"] in ("model_type", "dict_type"):
            reason = "expected an object"
        elif item["type"] == "missing":
            reason = "required key is missing"
        elif item["type"] == "union_tag_not_found":
            path, reason = f"{path}.type", "required key is missing"
        elif item["type"] == "union_tag_invalid":
            reason = f"{item['ctx']['tag']!r} is not one of {item['ctx']['expected_tags']}"
            path += ".type"
        problems.append(f"{root}{path}: {reason}")
    return "; ".join(problems)
