"""Models for the settings of backends, validated by pydantic.

Importing pydantic takes a tenth of a second, so only the modules of backends import this one, and a
program that opens no target imports none of them.
"""

from __future__ import annotations

from collections.abc import Collection
from typing import Annotated

from pydantic import BaseModel, ConfigDict, Field, StrictInt, StrictStr
from pydantic_core import PydanticCustomError

from warabi._core import config_keys

Bytes = Annotated[StrictInt, Field(ge=0)]
Positive = Annotated[StrictInt, Field(ge=1)]


class Model(BaseModel):
    """Settings; unknown keys are rejected."""

    model_config = ConfigDict(extra="forbid")


class PathModel(Model):
    """Settings of a persistent backend: ``path`` is the catalogue."""

    path: Annotated[StrictStr, Field(min_length=1)]


def unknown_key(key: str, known: Collection[str]) -> PydanticCustomError:
    """Return the error for an unknown key, for validators of models with extra keys."""
    return refused_key(key, config_keys.unknown(key, known))


def refused_key(key: str, reason: str) -> PydanticCustomError:
    """Return the error for a key, for any reason; *key* may have dots."""
    return PydanticCustomError("unknown_key", "{reason}", {"key": key, "reason": reason})
