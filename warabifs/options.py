"""Sources and options of ``mount.warabifs``: one table for parsing, help and messages."""

from __future__ import annotations

import difflib
import re
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

from warabi import address
from warabi.errors import ConfigError


@dataclass
class Options:
    """What was asked for with ``-o``."""

    read_only: bool = False
    create: bool = True
    provider_id: int = 0
    timeout: float = 60.0
    attr_timeout: float | None = None
    entry_timeout: float | None = None
    direct_io: bool = False
    allow_other: bool = False
    fsname: str = ""
    log_file: str = ""
    fuse: set[str] = field(default_factory=set)  # handed to the kernel as they are


@dataclass(frozen=True)
class _Option:
    """One option: what it sets, and what the help says of it."""

    apply: Callable[[Options, str], None]
    help: str
    value: str = ""  # the value's placeholder; empty for an option without one


def _number(name: str, text: str, low: float, high: float) -> float:
    try:
        number = float(text)
    except ValueError:
        number = low - 1
    if not low <= number <= high:
        raise ConfigError(f"option {name}={text}: expected a number from {low:g} to {high:g}")
    return number


def _flag(attribute: str, value: bool) -> Callable[[Options, str], None]:
    return lambda options, _: setattr(options, attribute, value)


def _text(attribute: str) -> Callable[[Options, str], None]:
    return lambda options, text: setattr(options, attribute, text)


def _seconds(name: str) -> Callable[[Options, str], None]:
    return lambda options, text: setattr(options, name, _number(name, text, 0, 1e9))


def _provider_id(options: Options, text: str) -> None:
    if not re.fullmatch("[0-9]{1,5}", text) or int(text) > 65535:
        raise ConfigError(f"option provider_id={text}: expected a number from 0 to 65535")
    options.provider_id = int(text)


OPTIONS: dict[str, _Option] = {
    "ro": _Option(_flag("read_only", True), "refuse every change"),
    "rw": _Option(_flag("read_only", False), "allow changes (default)"),
    "nocreate": _Option(_flag("create", False), "file: sources: refuse a target that is missing"),
    "provider_id": _Option(_provider_id, "which provider of the engine (default 0)", "N"),
    "timeout": _Option(
        _seconds("timeout"), "seconds after which an unanswered request fails (default 60)", "S"
    ),
    "attr_timeout": _Option(
        _seconds("attr_timeout"), "seconds for which attributes are believed (default: 1 for an"
        " engine, a day for an embedded target)", "S",
    ),
    "entry_timeout": _Option(
        _seconds("entry_timeout"),
        "seconds for which names are believed (default: 0 for an engine, a day for an embedded"
        " target); above 0, a file opened soon after another client changed it may be the old one",
        "S",
    ),
    "direct_io": _Option(_flag("direct_io", True), "bypass the page cache; no shared mmap"),
    "allow_other": _Option(
        _flag("allow_other", True), "let other users in, as permissions say (default for root)"
    ),
    "noallow_other": _Option(_flag("allow_other", False), "let nobody else in"),
    "fsname": _Option(_text("fsname"), "the source that mount(8) and df show", "NAME"),
    "log": _Option(_text("log_file"), "log to this file instead of the system log", "FILE"),
}  # fmt: skip

_KERNEL = frozenset(
    "suid nosuid dev nodev exec noexec async sync dirsync atime noatime diratime nodiratime"
    " relatime norelatime strictatime nostrictatime".split()
)
_TO_FUSE = frozenset("suid nosuid dev nodev exec noexec async sync dirsync noatime".split())
_IGNORED = frozenset(
    "defaults auto noauto user users nouser owner group nofail _netdev default_permissions"
    " nolazytime lazytime silent loud noiversion iversion".split()
)


def parse_options(groups: list[str], *, root: bool) -> Options:
    """The options of all ``-o`` arguments.

    Args:
        groups: each a comma-separated list.
        root: whether the mount is made by root, whose mounts others may use.

    Raises:
        ConfigError: an unknown option, with the closest known one, or a bad value.
    """
    options = Options(allow_other=root)
    for item in (item for group in groups for item in group.split(",") if item):
        name, has_value, value = item.partition("=")
        known = OPTIONS.get(name)
        if known is not None:
            if bool(known.value) != bool(has_value):
                form = f"{name}={known.value}" if known.value else name
                raise ConfigError(f"option {item}: expected {form}")
            known.apply(options, value)
        elif item in _KERNEL:
            if item in _TO_FUSE:
                options.fuse.add(item)
        elif item not in _IGNORED and not name.startswith(("x-", "comment")):
            raise ConfigError(_unknown(name))
    return options


def _unknown(name: str) -> str:
    close = difflib.get_close_matches(name, [*OPTIONS, *_KERNEL, *_IGNORED], 1)
    hint = f", did you mean {close[0]}?" if close else "; --help lists the options"
    return f"unknown option {name}{hint}"


@dataclass(frozen=True)
class Source:
    """What to mount: exactly one of memory, a target's path, or an engine's address."""

    text: str
    path: Path | None = None
    address: str = ""

    @property
    def embedded(self) -> bool:
        return not self.address


def parse_source(text: str, *, create: bool) -> Source:
    """The source that *text* names.

    Raises:
        ConfigError: it names none, or its parent directory does not exist.
    """
    kind, colon, rest = text.partition(":")
    if kind == "memory" and colon:
        if rest:
            raise ConfigError(f"source {text}: expected memory: and nothing after it")
        return Source(text)
    if kind == "file" and colon:
        if not rest:
            raise ConfigError(f"source {text}: expected file:/path/of/the/target")
        path = Path(rest).absolute()
        if not path.parent.is_dir():
            raise ConfigError(f"source {text}: the directory {path.parent} does not exist")
        if not create and not path.exists():
            raise ConfigError(f"source {text}: no such target, and nocreate was given")
        return Source(f"file:{path}", path=path)
    if colon and "://" in text:
        return Source(text, address=str(address.parse(text)))
    raise ConfigError(
        f"source {text}: expected memory:, file:/path/of/the/target, or an engine's address"
        " such as na+sm://123-0 or ofi+tcp://host:port"
    )


def help_text() -> str:
    """The options as ``--help`` lists them."""
    rows = [(f"{n}={o.value}" if o.value else n, o.help) for n, o in OPTIONS.items()]
    width = max(len(left) for left, _ in rows)
    return "\n".join(f"  {left:<{width}}  {right}" for left, right in rows)
