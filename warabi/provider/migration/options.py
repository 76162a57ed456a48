"""Options of a migration, and the configuration of the target at its destination."""

from __future__ import annotations

import json
from typing import Annotated, Any, cast

from pydantic import Field, SerializeAsAny, StrictBool, StrictStr

from warabi.backends import registry
from warabi.errors import ConfigError
from warabi.target.config import (
    Bytes,
    Model,
    TargetConfig,
    checked,
)

WHAT = "migration options"


class MigrationOptions(Model):
    """The options of ``migrate_target``; see there."""

    new_root: Annotated[StrictStr, Field(min_length=1)] | None = None
    transfer_size: Bytes = 0
    merge_config: dict[str, Any] = Field(default_factory=dict)
    remove_source: StrictBool = True


class _Patch(Model):
    type: StrictStr | None = None
    config: dict[str, Any] = Field(default_factory=dict)


class Destination(Model):
    """The configuration of the target that is sent to the destination.

    ``new_root`` is set if the destination must still determine the path.
    """

    target: SerializeAsAny[TargetConfig]
    new_root: StrictStr | None = None


class MigrationPlan(Destination):
    """The first message of a migration, an extension of :class:`Destination`."""

    uuid: Annotated[StrictStr, Field(min_length=1, max_length=64)]
    name: StrictStr
    """File name in a ``new_root`` that is a directory."""


def parse(options: dict[str, Any] | str | None) -> MigrationOptions:
    """Validate options; raises ``ConfigError`` with the JSON path of the problem."""
    if isinstance(options, str):
        try:
            options = cast("dict[str, Any]", json.loads(options or "{}"))
        except (json.JSONDecodeError, RecursionError) as error:
            raise ConfigError(f"{WHAT}: not valid JSON: {error}") from None
    return checked(MigrationOptions, options, what=WHAT)


def _merged(base: dict[str, Any], patch: dict[str, Any]) -> dict[str, Any]:
    """Merge *patch* into *base*, recursively."""
    result = dict(base)
    for key, value in patch.items():
        below = result.get(key)
        both = isinstance(below, dict) and isinstance(value, dict)
        result[key] = _merged(below, value) if both else value  # type: ignore[arg-type]
    return result


def destination(
    source: dict[str, Any], quota: int | None, options: MigrationOptions
) -> Destination:
    """Return the configuration of *source*, a target's, with *options* applied.

    Settings that the destination's backend does not have are dropped.  *quota* is a pmem target's
    own quota in bytes, which overrides its configuration.

    Raises:
        ConfigError: invalid options, with their JSON path.
    """
    merge, where = options.merge_config, "$.merge_config"
    if "target" in merge:
        if extra := sorted(merge.keys() - {"target"}):
            raise ConfigError(f"{WHAT}: {where}.{extra[0]}: unknown key")
        merge, where = merge["target"], f"{where}.target"
    patch = checked(_Patch, merge, what=WHAT, root=where)
    if "override_if_exists" in patch.config:
        raise ConfigError(
            f"{WHAT}: {where}.config.override_if_exists: a migration never replaces a target"
        )
    kind = patch.type or source["type"]
    backend = registry.find(kind)
    known = set() if backend is None else set(backend.config.model_fields)
    base = {key: value for key, value in source["config"].items() if key in known}
    base.pop("override_if_exists", None)
    if "create_if_missing_with_size" in base:
        base["create_if_missing_with_size"] = quota or 0
    config = _merged(base, patch.config)
    new_root = None
    if "path" in known and "path" not in patch.config:
        new_root = options.new_root
        if new_root is None and "path" not in base:
            raise ConfigError(
                f"{WHAT}: $.new_root: required key is missing, a target of type {kind!r} needs a"
                " path"
            )
        config["path"] = new_root or base["path"]
    merged = {"target": {"type": kind, "config": config}, "new_root": new_root}
    return checked(
        Destination, merged, what=WHAT, root=where.removesuffix(".target"),
        hidden=() if where.endswith(".target") else ("target",),
    )  # fmt: skip
