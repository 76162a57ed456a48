"""Configuration of a provider, checked by pydantic.  Not imported by clients: it takes time."""

from __future__ import annotations

import json
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, StrictBool, StrictInt, StrictStr, ValidationError

from warabi.errors import ConfigError

Bytes = Annotated[StrictInt, Field(ge=0)]
Positive = Annotated[StrictInt, Field(ge=1)]


class _Model(BaseModel):
    model_config = ConfigDict(extra="forbid")


class MemoryConfig(_Model):
    """Settings of the ``memory`` backend."""

    capacity: Bytes | None = None


class AbtIoConfig(_Model):
    """Thread-pool settings, accepted for compatibility with ABT-IO's configuration."""

    model_config = ConfigDict(extra="allow")


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


class MemoryTarget(_Model):
    type: Literal["memory"]
    config: MemoryConfig = Field(default_factory=MemoryConfig)


class FileTarget(_Model):
    type: Literal["abtio", "file"]
    config: FileConfig


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


TargetConfig = Annotated[MemoryTarget | FileTarget, Field(discriminator="type")]
TransferConfig = Annotated[DefaultTransfer | PipelineTransfer, Field(discriminator="type")]


class ProviderConfig(_Model):
    """What ``Provider`` takes: a target, or none yet, and a transfer manager."""

    target: TargetConfig | None = None
    transfer_manager: TransferConfig = Field(default_factory=DefaultTransfer)


def parse(config: dict[str, Any] | str | None) -> ProviderConfig:
    """*config* as a checked :class:`ProviderConfig`.

    Raises:
        ConfigError: no valid JSON text, or a key that is unknown, missing or of the wrong type;
            the message gives its JSON path.
    """
    if isinstance(config, str):
        try:
            config = json.loads(config or "{}")
        except (json.JSONDecodeError, RecursionError) as error:
            raise ConfigError(f"configuration: not valid JSON: {error}") from None
    try:
        return ProviderConfig.model_validate({} if config is None else config)
    except ValidationError as error:
        raise ConfigError(_explain(error)) from None


_UNIONS = ("target", "transfer_manager")


def _explain(error: ValidationError) -> str:
    """One line with the JSON path and the reason of every problem found."""
    problems = []
    for item in error.errors(include_url=False):
        location = [str(part) for part in item["loc"]]
        # A tagged union puts the tag into the path; the user's JSON does not have it.
        path = "".join(
            f".{part}" for i, part in enumerate(location)
            if not (i and location[i - 1] in _UNIONS and part not in ("type", "config"))
        )  # fmt: skip
        reason = item["msg"]
        if item["type"] == "extra_forbidden":
            reason = "unknown key"
        elif item["type"] == "missing":
            reason = "required key is missing"
        elif item["type"] == "union_tag_invalid":
            reason = f"{item['ctx']['tag']!r} is not one of {item['ctx']['expected_tags']}"
            path += ".type"
        problems.append(f"${path}: {reason}")
    return "configuration: " + "; ".join(problems)
