"""The ``warabi`` command: serves targets, and accesses them.

Every command exits with 0, or with 1 and one line on standard error; with 2 and a hint if the
command line is wrong; with 130 when interrupted; and silently with 141 when the reader of its
output has closed it.
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
import stat
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

import click

import warabi
from warabi._core.fileio import data_from, hole_from
from warabi._core.json_log import FORMATS, JsonFormatter
from warabi._core.output import output
from warabi.client import TargetHandle
from warabi.errors import ConfigError, Exception
from warabi.protocol.auth import config_of
from warabi.region import RegionID
from warabi.tools.access import client_engine, handle
from warabi.tools.cli.archive import export_command, import_command
from warabi.tools.cli.check import fsck, scrub
from warabi.tools.cli.common import (
    Commands,
    InputFile,
    authenticated,
    echo,
    print_lines,
    reaching,
    secured,
)
from warabi.tools.cli.config import config as config_commands
from warabi.tools.cli.stats import stats
from warabi.tools.progress import overall_progress
from warabi.tools.quoting import escaped, shell_quoted

_STEP = 8 * 1024 * 1024
"""Bytes of a region that are in memory at once."""

if TYPE_CHECKING:
    from warabi.bedrock import Server  # slow to import, and not needed by other commands


def _target(function: Any) -> Any:
    """Add the arguments that select a target, and how to connect to it."""
    return click.argument("address")(reaching(function))


def _serving(function: Any) -> Any:
    """Add the options for authentication of clients."""
    reading = click.option("--read-only-token-file", metavar="FILE", default=None,
                           help="The token for read-only clients.")  # fmt: skip
    insecure = click.option("--insecure", is_flag=True,
                            help="Listen beyond loopback without authentication.")  # fmt: skip
    return secured(reading(insecure(function)), False)


def _region(text: str) -> RegionID:
    try:
        return RegionID(bytes.fromhex(text))
    except ValueError:
        raise click.BadParameter(f"{text!r} is not a region ID of 32 hex digits") from None


@click.group(cls=Commands)
@click.version_option(warabi.__version__, prog_name="warabi")
def main() -> None:
    """Serve Warabi targets, and access them."""


main.add_command(scrub)
main.add_command(fsck)
main.add_command(export_command)
main.add_command(import_command)
main.add_command(config_commands)
main.add_command(stats)


@main.command(context_settings={"auto_envvar_prefix": "WARABI_SERVE"})
@click.argument("config", required=False, metavar="CONFIG", type=click.Path(path_type=Path),
                envvar="WARABI_SERVE_CONFIG")  # fmt: skip
@click.option("-a", "--address", default="na+sm", show_default=True, help="Where to listen.")
@click.option("--address-file", metavar="FILE", type=click.Path(path_type=Path),
              help="Write the address to FILE while serving.")  # fmt: skip
@click.option("--metrics", metavar="HOST:PORT",
              help="Serve metrics for Prometheus there, at /metrics.")  # fmt: skip
@click.option("--log-format", type=click.Choice(FORMATS), default="text", show_default=True,
              help="How messages are written to standard error.")  # fmt: skip
@click.option("-t", "--target", metavar="TARGET",
              help="Serve only this target, created if missing: memory: or file:PATH.")  # fmt: skip
@click.option("-p", "--provider-id", type=int, help="The provider ID of that target (default 0).")
@_serving
def serve(
    config: Path | None,
    address: str,
    address_file: Path | None,
    target: str | None,
    provider_id: int | None,
    metrics: str | None,
    log_format: str,
    **security: Any,
) -> None:
    """Serve the providers of CONFIG, in the format of Mochi's Bedrock, or one TARGET.

    CONFIG is TOML if its name ends with .toml, otherwise JSON; `warabi config check` checks it.
    Prints the address when it serves.  SIGTERM and SIGINT shut it down cleanly; SIGUSR1 logs
    what it is doing.

    Each option can also be given by an environment variable: --address-file as
    WARABI_SERVE_ADDRESS_FILE, CONFIG as WARABI_SERVE_CONFIG.
    """
    from warabi import service
    from warabi._core import descriptors
    from warabi.engine import state_of
    from warabi.eventloop import gc_pauses, state_dump
    from warabi.monitoring import monitored

    if (config is None) == (target is None):
        raise click.UsageError("expected either CONFIG or --target")
    if config is not None and provider_id is not None:
        raise click.UsageError("--provider-id requires --target; CONFIG has its own IDs")
    logging.basicConfig(format="warabi: %(message)s")
    if log_format == "json":
        logging.getLogger().handlers[0].setFormatter(JsonFormatter())
    descriptors.raise_limit()
    gc_pauses.limit_pauses()
    with (
        service.ShutdownSignals() as ending,
        _server(config, address, target, provider_id or 0, config_of(security)) as server,
        service.address_file(address_file, str(server.address)),
        contextlib.ExitStack() as stack,
    ):
        loop = state_of(server.engine).runtime
        assert loop is not None  # it serves
        stack.enter_context(state_dump.at_signal(loop.report, lambda: {"the engine": loop.token}))
        stack.enter_context(monitored(loop.report, loop.security, metrics=metrics))
        server.engine.on_finalize(ending.come)
        echo(str(server.address))
        service.notify("READY=1")
        ending.wait()
        service.notify("STOPPING=1")


def _server(
    config: Path | None,
    address: str,
    target: str | None,
    provider_id: int,
    engine: dict[str, Any],
) -> Server:
    from warabi.bedrock import Server

    if config is not None:
        return Server.from_config_file(address, config, engine)
    from warabi.backends import registry

    kind, colon, path = str(target).partition(":")
    backend = registry.find(kind) if colon else None
    if backend is None or not backend.spelled or backend.files != bool(path):
        expected = " or ".join(registry.spellings("PATH"))
        raise ConfigError(f"target {target!r}: expected {expected}")
    settings = {"type": kind, "config": backend.spelled_settings(path, create=True)}
    provider = {"type": "warabi", "provider_id": provider_id, "config": {"target": settings}}
    return Server(address, {"providers": [provider]}, engine)


@main.command("ls")
@_target
def list_regions(address: str, provider_id: int, **security: str) -> None:
    """List every region: its ID, size in bytes, and names.

    On a terminal names are quoted as by ls(1).  Elsewhere blanks, control characters and
    backslashes in them are escaped as a backslash and three octal digits, as in /proc/mounts, so
    that each region is one line and each name one word of it.
    """
    shown = _shell_quoted if sys.stdout is not None and sys.stdout.isatty() else escaped
    with handle(address, provider_id, security, read_only=True) as target:
        for region, found in target.list_stats():
            words = [b"%s %14d" % (region.hex().encode(), found.size), *map(shown, found.names)]
            print_lines([b" ".join(words)])


def _shell_quoted(name: str) -> bytes:
    return shell_quoted(name).encode(errors="surrogateescape")


@main.command()
@_target
@click.argument("file", type=InputFile(), default="-")
@click.option("-n", "--name", help="Give the region this path in the tree of names.")
def put(address: str, provider_id: int, file: IO[bytes], name: str | None, **security: str) -> None:
    """Store FILE, or standard input, as a new region, durably; prints its ID.

    On failure or interruption no region is left; if this command is killed, a region without a name
    may be left.
    """
    with handle(address, provider_id, security) as target:
        piece = file.read(_STEP)
        if len(piece) < _STEP:
            region = target.create_and_write(piece, persist=True)
        else:
            region = target.create(len(piece))
        with _finishing(target, region, name):
            if len(piece) == _STEP:
                _fill(target, region, piece, file)


@contextlib.contextmanager
def _finishing(target: TargetHandle, region: RegionID, name: str | None) -> Iterator[None]:
    """After the block, link *name* durably, if given, to a new region, and print its ID; if that or
    the block fails, erase the region."""
    try:
        yield
        if name is not None:
            target.link_name(region, name)
            target.persist(region, 0, 0)
    except BaseException:
        with contextlib.suppress(Exception):
            target.erase(region)
        raise
    echo(region.hex())


def _size(file: IO[bytes]) -> int:
    """Return the file's size in bytes; 0 for a pipe, whose size is unknown."""
    found = os.fstat(file.fileno())
    return found.st_size if stat.S_ISREG(found.st_mode) else 0


def _fill(target: TargetHandle, region: RegionID, piece: bytes, file: IO[bytes]) -> None:
    """Write *piece* and the rest of *file* to a new region, durably, whatever its size."""
    size, end = max(_size(file), len(piece)), 0
    target.resize(region, size)  # the size of a file with holes may exceed that of the storage
    for offset, data in _pieces(file, piece):
        end = offset + len(data)
        if end > size:
            size = end
            target.resize(region, size)
        target.write(region, offset, data)
    if end < size:  # the file was truncated, or not read from its start
        target.resize(region, end)
    target.persist(region, 0, end)


def _pieces(file: IO[bytes], piece: bytes) -> Iterator[tuple[int, bytes]]:
    """Yield the data of *file* with their offsets, beginning with *piece*, which was read.

    Holes of a regular file are left out.  The last item has no data, and its offset is the end.
    """
    size, offset, start = _size(file), 0, 0
    if size:
        start = file.seek(-len(piece), os.SEEK_CUR)
        piece = b""
    while True:
        step = _STEP
        if start + offset < size:
            data, end = _next_data(file, start + offset, size)
            offset = file.seek(data) - start
            step = min(step, end - data or step)
        piece = piece or file.read(step)
        yield offset, piece
        if not piece:
            return
        offset += len(piece)
        piece = b""


def _next_data(file: IO[bytes], offset: int, size: int) -> tuple[int, int]:
    """Return start and end of the next data of a file of *size* bytes; its position is kept."""
    fd = file.fileno()
    position = os.lseek(fd, 0, os.SEEK_CUR)
    try:
        data = data_from(fd, offset, size)
        return data, hole_from(fd, data, size)
    finally:
        os.lseek(fd, position, os.SEEK_SET)


@main.command()
@_target
@click.argument("region")
@click.argument("file", default="-")
def get(address: str, provider_id: int, region: str, file: str, **security: str) -> None:
    """Write a region, by its ID or its path, to FILE or standard output.

    FILE is created, or replaced, when it is complete.
    """
    with handle(address, provider_id, security, read_only=True) as target:
        found = target.open_name(region) if region.startswith("/") else _region(region)
        size, done = target.size(found), 0
        buffer = memoryview(bytearray(min(size, _STEP)))
        with output(file) as out:
            for start, length in target.data_extents(found):
                out.skip(min(start, size) - done)
                done = min(start + length, size)
                for offset in range(start, done, _STEP):
                    piece = buffer[: done - offset]
                    target.read_into(found, offset, piece)
                    out.write(piece)
            out.skip(size - done)


@main.command()
@_target
@click.argument("region")
@click.option("-n", "--name", help="Give the copy this path in the tree of names.")
def clone(address: str, provider_id: int, region: str, name: str | None, **security: str) -> None:
    """Copy a region, by its ID or its path, to a new one, durably; prints its ID.

    The provider copies.  The copy shares blocks with the region if the file system of the target
    can, and keeps its holes.
    """
    with handle(address, provider_id, security) as target:
        found = target.open_name(region) if region.startswith("/") else _region(region)
        with _finishing(target, target.copy(found, persist=True), name):
            pass


@main.command()
@_target
@click.argument("region")
def rm(address: str, provider_id: int, region: str, **security: str) -> None:
    """Erase a region by its ID, or remove a name by its path."""
    with handle(address, provider_id, security) as target:
        if region.startswith("/"):
            target.unlink_name(region)
        else:
            target.erase(_region(region))


@main.command()
@click.argument("source", metavar="SOURCE_ADDRESS")
@click.argument("source_id", metavar="SOURCE_PROVIDER", type=click.IntRange(0, 65535))
@click.argument("destination", metavar="DEST_ADDRESS")
@click.argument("destination_id", metavar="DEST_PROVIDER", type=click.IntRange(0, 65535))
@click.option("--new-root", metavar="PATH",
              help="The target's path at the destination, or a directory for it.")  # fmt: skip
@click.option("--transfer-size", metavar="BYTES", type=click.IntRange(min=0),
              help="Bytes of region data per message.")  # fmt: skip
@click.option("--merge-config", metavar="JSON",
              help="Settings to merge into the target's configuration.")  # fmt: skip
@click.option("--keep-source", is_flag=True, help="Do not remove the source's files.")
@authenticated
def migrate(
    source: str,
    source_id: int,
    destination: str,
    destination_id: int,
    new_root: str | None,
    transfer_size: int | None,
    merge_config: str | None,
    keep_source: bool,
    **security: str,
) -> None:
    """Migrate the target of a running provider to another provider, which has none yet.

    DEST_ADDRESS and paths are as seen by the source and the destination.  Reads continue during the
    migration, changes wait.  Interrupting this command does not stop the migration.
    """
    from warabi.tools.migrate import ask

    options: dict[str, Any] = {"remove_source": not keep_source}
    if new_root is not None:
        options["new_root"] = new_root
    if transfer_size is not None:
        options["transfer_size"] = transfer_size
    if merge_config is not None:
        try:
            options["merge_config"] = json.loads(merge_config)
        except (json.JSONDecodeError, RecursionError) as error:
            raise click.BadParameter(
                f"not valid JSON: {error}", param_hint="--merge-config"
            ) from None
    with client_engine(source, security) as engine, overall_progress("migrate") as show:
        ask(engine, (source, source_id), (destination, destination_id), options, show)
