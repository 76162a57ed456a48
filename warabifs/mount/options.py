"""Sources and options of ``mount.warabifs``: one table for parser, help, manual page and docs."""

from __future__ import annotations

import difflib
import grp
import pwd
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from enum import Enum, auto
from pathlib import Path

from warabi._core.json_log import FORMATS
from warabi.backends import Backend, registry
from warabi.errors import ConfigError
from warabi.metadata.domain import NAME_MAX
from warabi.protocol import address
from warabifs.frontends.base import Ability
from warabifs.frontends.registry import DEFAULT, FRONT_ENDS
from warabifs.fs.owner_override import Shown

LOCAL_LOCKS = {"none": ("flock", "posix"), "flock": ("posix",), "posix": ("flock",), "all": ()}
"""Values of ``local_lock``, and which locks the provider keeps."""


@dataclass
class Options:
    """The options given with ``-o``."""

    read_only: bool = False
    create: bool = True
    provider_id: int = 0
    timeout: float = 60.0
    reconnect: float = 30.0
    attr_timeout: float | None = None
    entry_timeout: float | None = None
    negative_timeout: float | None = None
    direct_io: bool = False
    exclusive: bool = False
    passthrough: bool = False
    local_lock: str | None = None
    frontend: str = DEFAULT
    allow_other: bool = False
    size: Callable[[int], int] | None = None  # maps the bytes of RAM to the limit
    fsname: str = ""
    log_file: str = ""
    log_format: str = "text"
    stats: str = ".stats"
    metrics: str | None = None
    http: str | None = None
    security: dict[str, str] = field(
        default_factory=dict
    )  # as warabi.protocol.auth.config_of takes it
    fuse: set[str] = field(default_factory=set)  # passed to the kernel unchanged
    shown: Shown = field(default_factory=Shown)
    remount: bool = False
    flags: set[str] = field(default_factory=set)  # the kernel's flags, as given
    fixed: list[str] = field(default_factory=list)  # other options, which a remount cannot change


@dataclass(frozen=True)
class _Option:
    """An option: what it sets, and its help text."""

    apply: Callable[[Options, str], None]
    help: str
    value: str = ""  # the value's placeholder; empty for an option without one
    needs: Ability | None = None  # what the front end has to support


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


def _path(attribute: str) -> Callable[[Options, str], None]:
    # Absolute, since the mount process changes its working directory.
    return lambda options, text: setattr(options, attribute, text and str(Path(text).absolute()))


def _seconds(name: str) -> Callable[[Options, str], None]:
    return lambda options, text: setattr(options, name, _number(name, text, 0, 1e9))


def _security(name: str) -> Callable[[Options, str], None]:
    return lambda options, text: options.security.update({name: text})


def _file(name: str) -> Callable[[Options, str], None]:
    return lambda options, text: options.security.update({name: str(Path(text).absolute())})


def _frontend(options: Options, text: str) -> None:
    if text not in FRONT_ENDS:
        raise ConfigError(f"option frontend={text}: expected {' or '.join(FRONT_ENDS)}")
    options.frontend = text


def _local_lock(options: Options, text: str) -> None:
    if text not in LOCAL_LOCKS:
        raise ConfigError(f"option local_lock={text}: expected {', '.join(LOCAL_LOCKS)}")
    options.local_lock = text


def _log_format(options: Options, text: str) -> None:
    if text not in FORMATS:
        raise ConfigError(f"option log_format={text}: expected {' or '.join(FORMATS)}")
    options.log_format = text


def _stats(options: Options, text: str) -> None:
    if "/" in text or text in (".", "..") or len(text.encode(errors="replace")) > NAME_MAX:
        raise ConfigError(f"option stats={text}: expected the name of a file")
    options.stats = text


def _provider_id(options: Options, text: str) -> None:
    if not re.fullmatch("[0-9]{1,5}", text) or int(text) > 65535:
        raise ConfigError(f"option provider_id={text}: expected a number from 0 to 65535")
    options.provider_id = int(text)


def _uid(options: Options, text: str) -> None:
    options.shown.uid = _user_or_group("uid", text, lambda name: pwd.getpwnam(name).pw_uid)


def _gid(options: Options, text: str) -> None:
    options.shown.gid = _user_or_group("gid", text, lambda name: grp.getgrnam(name).gr_gid)


def _user_or_group(name: str, text: str, find: Callable[[str], int]) -> int:
    if re.fullmatch("[0-9]{1,10}", text) and int(text) < (1 << 32) - 1:  # the last: none
        return int(text)
    try:
        return find(text)
    except (KeyError, ValueError):
        what = "user" if name == "uid" else "group"
        raise ConfigError(f"option {name}={text}: no such {what}, and not a number") from None


def _umask(options: Options, text: str) -> None:
    if not re.fullmatch("0{0,9}[0-7]{1,3}", text):
        raise ConfigError(f"option umask={text}: expected an octal number from 0 to 777")
    options.shown.umask = int(text, 8)


def _size(options: Options, text: str) -> None:
    found = re.fullmatch("([0-9]{1,20})([kmgtKMGT%]?)", text)
    if not found or (found[2] == "%" and int(found[1]) > 100):
        raise ConfigError(
            f"option size={text}: expected bytes, optionally with a suffix k, m, g or t, or 0% to"
            " 100% of the memory"
        )
    number, unit = int(found[1]), found[2].lower()
    if unit == "%":
        options.size = lambda memory: memory * number // 100
    else:
        size = number << 10 * " kmgt".index(unit or " ")
        options.size = lambda memory: size


OPTIONS: dict[str, _Option] = {
    "ro": _Option(_flag("read_only", True), "mount read-only"),
    "rw": _Option(_flag("read_only", False), "allow changes (default)"),
    "nocreate": _Option(_flag("create", False), "file: sources: refuse a target that is missing"),
    "size": _Option(
        _size, "memory: sources: most bytes of memory for files (suffix k, m, g or t), or a"
        " percentage of RAM (default 50%; 0: no limit)", "BYTES|N%",
    ),
    "provider_id": _Option(_provider_id, "which provider of the engine (default 0)", "N"),
    "timeout": _Option(
        _seconds("timeout"), "seconds after which a request without reply fails (default 60)", "S"
    ),
    "reconnect": _Option(
        _seconds("reconnect"), "seconds for which operations wait for a provider to come back"
        " (default 30; 0: they fail at once)", "S",
    ),
    "attr_timeout": _Option(
        _seconds("attr_timeout"), "seconds for which the kernel caches attributes (default: 1 for"
        " an engine, a day for an embedded target)", "S",
    ),
    "entry_timeout": _Option(
        _seconds("entry_timeout"),
        "seconds for which the kernel caches names (default: 0 for an engine, 1 for names of"
        " directories, a day for an embedded target); above 0, opening a name while another"
        " client replaces it may open the old file",
        "S",
    ),
    "negative_timeout": _Option(
        _seconds("negative_timeout"), "seconds for which the kernel caches that a name does not"
        " exist (default: as entry_timeout)", "S",
    ),
    "direct_io": _Option(
        _flag("direct_io", True), "strict: every read and write bypasses the page cache; shared"
        " mmap needs Linux 6.6",
        needs=Ability.DIRECT_IO,
    ),
    "exclusive": _Option(
        _flag("exclusive", True), "no other client changes the target: writes are cached until a"
        " file is closed or synced, names and attributes for a day",
        needs=Ability.WRITEBACK,
    ),
    "local_lock": _Option(
        _local_lock, "which locks only programs of this mount see, as for NFS: none, flock, posix"
        " or all (default: none for an engine, all for an embedded target and with exclusive)",
        "LOCKS", needs=Ability.LOCKS,
    ),
    "passthrough": _Option(
        _flag("passthrough", True), "embedded targets, root only, Linux 6.14: the kernel reads and"
        " writes region files directly; opening and closing files takes longer; implies nosuid",
        needs=Ability.PASSTHROUGH,
    ),
    "frontend": _Option(
        _frontend, "the implementation of the FUSE protocol: kernel (default), warabifs' own, or"
        " pyfuse3, an optional package with fewer abilities", "NAME",
    ),
    "allow_other": _Option(
        _flag("allow_other", True), "let other users access the mount, subject to permissions"
        " (default for root)"
    ),
    "noallow_other": _Option(
        _flag("allow_other", False), "only the mounting user may access the mount"
    ),
    "token_file": _Option(_file("token_file"), "the token of an engine that requires one", "FILE"),
    "tls_cert": _Option(_file("tls_cert"), "with TLS: the mount's certificate, PEM", "FILE"),
    "tls_key": _Option(_file("tls_key"), "the certificate's key", "FILE"),
    "tls_ca": _Option(
        _file("tls_ca"), "the certificate of the CA that signs both sides' certificates", "FILE"
    ),
    "tls_name": _Option(
        _security("tls_name"), "the name in the engine's certificate, if not its host's", "NAME"
    ),
    "uid": _Option(_uid, "show and create all files as owned by this user", "USER"),
    "gid": _Option(_gid, "show and create all files as owned by this group", "GROUP"),
    "umask": _Option(
        _umask, "show all permissions as 0777 less these bits, ignoring stored ones", "OCTAL"
    ),
    "remount": _Option(
        _flag("remount", True), "change ro, noatime and other kernel options of an existing mount"
        " (root only); the options of this list cannot be changed",
    ),
    "fsname": _Option(_text("fsname"), "the source that mount(8) and df show", "NAME"),
    "log": _Option(_path("log_file"), "log to this file instead of the system log", "FILE"),
    "log_format": _Option(
        _log_format, "how messages are logged: text (default), or json, an object in each line",
        "FORMAT",
    ),
    "http": _Option(_text("http"), "serve a status page there", "HOST:PORT"),
    "metrics": _Option(
        _text("metrics"), "serve metrics for Prometheus there, at /metrics", "HOST:PORT"
    ),
    "stats": _Option(
        _stats, "name of the file in the root directory that reports the mount's counters, and is"
        " in no listing (default .stats; empty: none)", "NAME",
    ),
}  # fmt: skip


class _Kind(Enum):
    """What is done with an option that every file system has."""

    FLAG = auto()  # remembered for a remount; those of _TO_FUSE are passed to the kernel
    LABEL = auto()  # passed to the kernel with its value, where SELinux is enabled
    IGNORED = auto()


@dataclass(frozen=True)
class _Common:
    """Options of every file system: those that help shows, its text, and further spellings."""

    kind: _Kind
    shown: str  # separated by commas
    help: str
    more: str = ""  # accepted, and not shown


_COMMON = (
    _Common(
        _Kind.FLAG, "noatime, atime, relatime, strictatime, nodiratime",
        "accepted; reads never change access times", "norelatime, nostrictatime, diratime",
    ),
    _Common(
        _Kind.FLAG, "nosuid, suid", "whether set-id bits count when a program is run (default:"
        " nosuid; suid for root's mounts by mount(8) and fstab without uid=, gid=, umask=)",
    ),
    _Common(
        _Kind.FLAG, "nodev, dev", "whether device files can be opened (default: as for suid)"
    ),
    _Common(_Kind.FLAG, "noexec, exec", "whether programs can be run"),
    _Common(
        _Kind.FLAG, "sync, async, dirsync", "whether the kernel syncs after every write"
    ),
    _Common(
        _Kind.LABEL, "context=, fscontext=, defcontext=, rootcontext=",
        "SELinux labels; refused where SELinux is not enabled",
    ),
    _Common(
        _Kind.IGNORED, "default_permissions", "always on: the kernel checks permissions"
    ),
    _Common(
        _Kind.IGNORED, "_netdev, auto, noauto, nofail, user, users, owner, group, defaults, x-*",
        "for mount(8) and systemd, without effect here", "nouser, nousers, noowner, nogroup,"
        " lazytime, nolazytime, silent, loud, iversion, noiversion",
    ),
)  # fmt: skip

KERNEL = {common.shown: common.help for common in _COMMON}
"""Further options that ``-o`` accepts, for help, manual page and docs/mount-options.md."""


def _names(kind: _Kind) -> frozenset[str]:
    texts = (f"{common.shown}, {common.more}" for common in _COMMON if common.kind is kind)
    return frozenset(name.rstrip("=") for text in texts for name in text.split(", ") if name)


_FLAGS, _LABELS, _IGNORED = map(_names, (_Kind.FLAG, _Kind.LABEL, _Kind.IGNORED))
_TO_FUSE = frozenset("suid nosuid dev nodev exec noexec async sync dirsync noatime".split())
_OPPOSITE = {"sync": "async", "async": "sync"}  # the opposite of the others has the prefix "no"
_CONFLICTS = {
    ("exclusive", "direct_io"): "at most one of them",
    ("passthrough", "exclusive"): "at most one of them",
    ("passthrough", "direct_io"): "at most one of them",
    ("passthrough", "suid"): "the kernel would not clear set-id bits on writes",
    ("passthrough", "sync"): "the kernel would sync data but not metadata",
}
_SHOWN = frozenset("user_id group_id fd rootmode max_read blksize uhelper".split())
"""Options in the mount table, which mount(8) passes on a remount."""


def parse_options(
    groups: list[str], *, root: bool, sloppy: bool = False, helper: bool = False
) -> Options:
    """Parse all ``-o`` arguments.

    Args:
        groups: each a comma-separated list.
        root: whether root mounts, so that other users may access the mount by default.
        sloppy: whether to ignore unknown options.
        helper: whether mount(8) passes them.  It strips ``suid`` and ``dev``, which are its
            defaults, so root's mounts get both unless the opposite is given, as with mount.fuse3.

    Raises:
        ConfigError: an unknown option (with the closest known one), or an invalid value.
    """
    options = Options(allow_other=root)
    items = [item for group in groups for item in _items(group)]
    for item in items:
        name, has_value, value = item.partition("=")
        known = OPTIONS.get(name)
        if known is not None:
            if bool(known.value) != bool(has_value):
                form = f"{name}={known.value}" if known.value else name
                raise ConfigError(f"option {item}: expected {form}")
            known.apply(options, value)
            if name not in ("ro", "rw", "remount"):
                options.fixed.append(item)
        elif item in _FLAGS:
            options.flags -= {f"no{item}", item.removeprefix("no"), _OPPOSITE.get(item, "")}
            options.flags.add(item)
        elif name in _LABELS and has_value:
            options.fuse.add(_label(name, value))
        elif name in _SHOWN and "remount" in items:
            continue
        elif item not in _IGNORED and not name.startswith(("x-", "X-", "comment")) and not sloppy:
            raise ConfigError(_unknown(name))
    _check_abilities(options)
    if options.passthrough and not root:
        raise ConfigError("option passthrough: only root may have the kernel use descriptors")
    for pair, reason in _CONFLICTS.items():
        if all(name in options.flags or getattr(options, name, False) for name in pair):
            raise ConfigError(f"options {' and '.join(pair)}: {reason}")
    if options.passthrough:
        options.flags.add("nosuid")
    options.fuse |= options.flags & _TO_FUSE
    # Not with overridden owners or permissions: a set-ID program would run as the owner that
    # is shown, and a device would be accessible to every user.
    if helper and root and not options.shown:
        options.fuse |= {flag for flag in ("suid", "dev") if f"no{flag}" not in options.flags}
    return options


def _check_abilities(options: Options) -> None:
    """Raises ConfigError for an option that the front end does not support."""
    abilities = FRONT_ENDS[options.frontend].abilities
    for item in options.fixed:
        needs = OPTIONS[item.partition("=")[0]].needs
        if needs is not None and needs not in abilities:
            able = " or ".join(name for name, one in FRONT_ENDS.items() if needs in one.abilities)
            raise ConfigError(f"option {item}: only with frontend={able}")


def _items(group: str) -> Iterator[str]:
    """Split a list of options; commas between double quotes do not separate."""
    for item in re.findall(r'(?:"[^"]*"|[^,"]|")+', group):
        yield item.replace('"', "") if item.split("=")[0] in _LABELS else item


def _label(name: str, value: str) -> str:
    if not Path("/sys/fs/selinux/enforce").exists():
        raise ConfigError(f"option {name}={value}: SELinux is not enabled here")
    return f"{name}={value}"


def _unknown(name: str) -> str:
    close = difflib.get_close_matches(name, [*OPTIONS, *_FLAGS, *_IGNORED, *_LABELS], 1)
    hint = f", did you mean {close[0]}?" if close else "; --help lists the options"
    return f"unknown option {name}{hint}"


@dataclass(frozen=True)
class Source:
    """What to mount: either a backend, with the path of the target if the backend has paths, or
    what else says where it is, or the address of an engine."""

    text: str
    backend: Backend | None = None
    path: Path | None = None
    address: str = ""
    place: str = ""

    @property
    def embedded(self) -> bool:
        return not self.address

    @property
    def remote(self) -> bool:
        """Whether the engine is, or may be, on another host."""
        return bool(self.address) and not address.parse(self.address).local


def parse_source(text: str, *, create: bool) -> Source:
    """Parse the source *text*.

    Raises:
        ConfigError: it is not valid, or its parent directory does not exist.
    """
    kind, colon, rest = text.partition(":")
    if "://" in text and not any(kind in backend.names for backend in registry.loaded()):
        return Source(text, address=str(address.parse(text)))
    backend = registry.find(kind) if colon else None
    if backend is None or not backend.spelled:
        raise ConfigError(
            f"source {text}: expected {', '.join(registry.spellings('/path/of/the/target'))}, or an"
            " engine's address such as na+sm://123-0 or ofi+tcp://host:port"
        )
    if backend.spelling is not None:
        backend.spelled_settings(rest, create=create)
        return Source(text, backend, place=rest)
    if not backend.files:
        if rest:
            raise ConfigError(f"source {text}: expected {kind}: and nothing after it")
        return Source(text, backend)
    if not rest:
        raise ConfigError(f"source {text}: expected {kind}:/path/of/the/target")
    path = Path(rest).absolute()
    if not path.parent.is_dir():
        raise ConfigError(f"source {text}: the directory {path.parent} does not exist")
    if not create and not path.exists():
        raise ConfigError(f"source {text}: no such target, and the option nocreate is set")
    return Source(f"{kind}:{path}", backend, path)


def rows() -> list[tuple[str, str]]:
    """Return our own options as they are written, with their help texts."""
    return [(f"{n}={o.value}" if o.value else n, o.help) for n, o in OPTIONS.items()]


def markdown() -> str:
    """Return the tables of docs/mount-options.md, which ``python -m`` this module prints."""
    own = (f"| `{left.replace('|', chr(92) + '|')}` | {right} |" for left, right in rows())
    common = (
        f"| {', '.join(f'`{name}`' for name in left.split(', '))} | {right} |"
        for left, right in KERNEL.items()
    )
    head = "| option | meaning |\n|---|---|"
    return "\n".join((head, *own, "", "Options of every file system:", "", head, *common, ""))


def help_text() -> str:
    """Return the list of options for ``--help``."""
    width = max(len(left) for left, _ in rows())
    lines = [f"  {left:<{width}}  {right}" for left, right in rows()]
    lines += ["", "options of every file system:"]
    lines += [f"  {left}: {right}" for left, right in KERNEL.items()]
    return "\n".join(lines)


if __name__ == "__main__":
    print(markdown(), end="")
