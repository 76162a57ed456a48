"""Configuration of a provider, checked by pydantic.  Not imported by clients: it takes time."""

from __future__ import annotations

import json
from collections.abc import Collection
from typing import Annotated, Any, Literal, TypeVar, get_args

from pydantic import (
    AfterValidator,
    BaseModel,
    ConfigDict,
    Field,
    StrictBool,
    StrictInt,
    StrictStr,
    ValidationError,
    model_validator,
)
from pydantic_core import PydanticCustomError

from warabi._core import config_keys
from warabi.errors import ConfigError

Bytes = Annotated[StrictInt, Field(ge=0)]
Positive = Annotated[StrictInt, Field(ge=1)]
SMALLEST_POOL = 8 * 1024 * 1024
"""Bytes that a ``pmem`` target has at least, as PMDK's pools do."""


class _Model(BaseModel):
    model_config = ConfigDict(extra="forbid")


_AnyModel = TypeVar("_AnyModel", bound=BaseModel)


class MemoryConfig(_Model):
    """Settings of the ``memory`` backend."""

    capacity: Bytes | None = None


def unknown_key(key: str, known: Collection[str]) -> PydanticCustomError:
    """For validators of models that accept some keys that they have no field for."""
    return refused_key(key, config_keys.unknown(key, known))


def refused_key(key: str, reason: str) -> PydanticCustomError:
    """As :func:`unknown_key`, for another reason; *key* may have dots."""
    return PydanticCustomError("unknown_key", "{reason}", {"key": key, "reason": reason})


class AbtIoConfig(_Model):
    """Thread-pool settings, as ABT-IO has them; those that mean nothing here are accepted.

    ``backing_thread_count`` is how many requests may wait for the medium at once.
    """

    model_config = ConfigDict(extra="allow")
    backing_thread_count: Positive | None = None

    @model_validator(mode="after")
    def _known(self) -> AbtIoConfig:
        for key in self.model_extra or ():
            if key not in config_keys.ABT_IO:
                raise unknown_key(key, {"backing_thread_count", *config_keys.ABT_IO})
        return self


class FileConfig(_Model):
    """Settings of the ``abtio`` backend, also called ``file``."""

    path: Annotated[StrictStr, Field(min_length=1)]
    create_if_missing: StrictBool = False
    override_if_exists: StrictBool = False
    alignment: Annotated[StrictInt, Field(ge=8, multiple_of=8)] = 8
    directio: StrictBool = False
    sync: StrictBool = False
    abt_io: AbtIoConfig = Field(default_factory=AbtIoConfig)
    capacity: Bytes | None = None
    checksums: StrictBool | None = None  # None: as the target has been so far
    packed: StrictBool | None = None  # None: true


def _no_pool_or_large(size: int) -> int:
    if 0 < size < SMALLEST_POOL:
        raise ValueError(f"expected 0 or at least {SMALLEST_POOL}")
    return size


class PmemConfig(_Model):
    """Settings of the ``pmem`` backend, also called ``pmdk``."""

    path: Annotated[StrictStr, Field(min_length=1)]
    create_if_missing_with_size: Annotated[Bytes, AfterValidator(_no_pool_or_large)] = 0
    override_if_exists: StrictBool = False
    checksums: StrictBool | None = None


class MemoryTarget(_Model):
    type: Literal["memory"]
    config: MemoryConfig = Field(default_factory=MemoryConfig)


class FileTarget(_Model):
    type: Literal["abtio", "file"]
    config: FileConfig


class PmemTarget(_Model):
    type: Literal["pmem", "pmdk"]
    config: PmemConfig


class DefaultTransfer(_Model):
    type: Literal["__default__"] = "__default__"
    config: _Model = Field(default_factory=_Model)


class PipelineConfig(_Model):
    """Settings of the ``pipeline`` transfer manager, all required."""

    num_pools: Positive
    num_buffers_per_pool: Positive
    first_buffer_size: Positive
    buffer_size_multiplier: Annotated[StrictInt, Field(gt=1)]


class PipelineTransfer(_Model):
    type: Literal["pipeline"]
    config: PipelineConfig


TargetConfig = Annotated[MemoryTarget | FileTarget | PmemTarget, Field(discriminator="type")]
TransferConfig = Annotated[DefaultTransfer | PipelineTransfer, Field(discriminator="type")]


class MigrationConfig(_Model):
    """What peers over the network may: see ``provider/migration/permission.py``."""

    send: StrictBool = False
    receive: StrictBool = False
    root: Annotated[StrictStr, Field(min_length=1)] | None = None


class ProviderConfig(_Model):
    """What ``Provider`` takes: a target, or none yet, and a transfer manager."""

    target: TargetConfig | None = None
    migration: MigrationConfig | None = None
    transfer_manager: TransferConfig = Field(default_factory=DefaultTransfer)


def parse(config: dict[str, Any] | str | None) -> ProviderConfig:
    """*config* as a checked :class:`ProviderConfig`; raises as :func:`checked`."""
    return checked(ProviderConfig, config)


def checked(
    model: type[_AnyModel],
    config: dict[str, Any] | str | None,
    *,
    what: str = "configuration",
    root: str = "$",
    hidden: tuple[str, ...] = (),
) -> _AnyModel:
    """*config*, a dict or JSON text, as a *model*.

    Args:
        what: begins the message of an error.
        root: the JSON path of *config* in what the user wrote.
        hidden: keys at its top that the user did not write.

    Raises:
        ConfigError: no valid JSON text, or a key that is unknown, missing or of the wrong type;
            the message gives its JSON path.
    """
    if isinstance(config, str):
        try:
            config = json.loads(config or "{}")
        except (json.JSONDecodeError, RecursionError) as error:
            raise ConfigError(f"{what}: not valid JSON: {error}") from None
    try:
        return model.model_validate({} if config is None else config)
    except ValidationError as error:
        raise ConfigError(f"{what}: {_explain(model, error, root, hidden)}") from None


_UNIONS = ("target", "transfer_manager")


def _fields(model: type[BaseModel], location: tuple[int | str, ...]) -> Collection[str]:
    """The keys that the model at *location*, as pydantic tells it, below *model* has."""
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
    """Every model that an annotation has."""
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return [annotation]
    return [model for part in get_args(annotation) for model in _models(part)]


def _explain(
    model: type[BaseModel], error: ValidationError, root: str, hidden: tuple[str, ...]
) -> str:
    """One line with the JSON path and the reason of every problem found."""
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
