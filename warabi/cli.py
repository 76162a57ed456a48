"""``warabi``: serve targets, and look into one.

Every command exits with 0, or with 1 and one line on standard error; with 2 and a hint when the
command line itself is wrong.
"""

from __future__ import annotations

import contextlib
import errno
import logging
import os
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

import warabi
from warabi.client import Client, TargetHandle
from warabi.engine import Engine, Mode
from warabi.errors import ConfigError, Exception, InvalidRegion
from warabi.region import RegionID

if TYPE_CHECKING:
    from warabi.bedrock import Server  # takes time to import, which the other commands need not


@contextlib.contextmanager
def _one_line() -> Iterator[None]:
    try:
        yield
    except (Exception, OSError) as error:
        if isinstance(error, OSError) and error.errno == errno.EPIPE:
            raise  # nobody reads any more; click ends quietly
        sys.exit(f"warabi: {error}")


@contextlib.contextmanager
def _handle(address: str, provider_id: int) -> Iterator[TargetHandle]:
    with _one_line(), Engine(address.split("://")[0], Mode.CLIENT) as engine:
        yield Client(engine).make_target_handle(address, provider_id)


def _target(function: Any) -> Any:
    """The arguments that name a target."""
    option = click.option("-p", "--provider-id", type=int, default=0, show_default=True)
    return click.argument("address")(option(function))


def _region(text: str) -> RegionID:
    try:
        return RegionID(bytes.fromhex(text))
    except ValueError:
        raise click.BadParameter(f"{text!r} is not a region ID of 32 hex digits") from None


@click.group()
@click.version_option(warabi.__version__, prog_name="warabi")
def main() -> None:
    """Serve Warabi targets, and reach one."""


@main.command()
@click.argument("config", required=False, metavar="CONFIG.json", type=click.Path(path_type=Path))
@click.option("-a", "--address", default="na+sm", show_default=True, help="Where to listen.")
@click.option("--address-file", metavar="FILE", type=click.Path(path_type=Path),
              help="Keep the address in FILE while it serves.")  # fmt: skip
@click.option("-t", "--target", metavar="TARGET",
              help="Serve just this: memory: or file:PATH, made when missing.")  # fmt: skip
@click.option("-p", "--provider-id", type=int, help="The ID of that target's provider, 0 if none.")
def serve(
    config: Path | None,
    address: str,
    address_file: Path | None,
    target: str | None,
    provider_id: int | None,
) -> None:
    """Serve what CONFIG.json says, in the form that Mochi's Bedrock takes, or one TARGET.

    Prints the address when it serves.  SIGTERM and SIGINT end it, in order.
    """
    from warabi import service

    if (config is None) == (target is None):
        raise click.UsageError("expected either CONFIG.json or --target")
    if config is not None and provider_id is not None:
        raise click.UsageError("--provider-id goes with --target; CONFIG.json has its own")
    logging.basicConfig(format="warabi: %(message)s")
    with (
        _one_line(),
        service.Ending() as ending,
        _server(config, address, target, provider_id or 0) as server,
        service.address_file(address_file, str(server.address)),
    ):
        server.engine.on_finalize(ending.come)
        click.echo(str(server.address))
        service.notify("READY=1")
        ending.wait()
        service.notify("STOPPING=1")


def _server(config: Path | None, address: str, target: str | None, provider_id: int) -> Server:
    from warabi.bedrock import Server

    if config is not None:
        return Server.from_config_file(address, config)
    kind, _, path = str(target).partition(":")
    if target == "memory:":
        settings: dict[str, Any] = {"type": "memory"}
    elif kind == "file" and path:
        settings = {"type": "file", "config": {"path": path, "create_if_missing": True}}
    else:
        raise ConfigError(f"target {target!r}: expected memory: or file:PATH")
    provider = {"type": "warabi", "provider_id": provider_id, "config": {"target": settings}}
    return Server(address, {"providers": [provider]})


@main.command("ls")
@_target
def list_regions(address: str, provider_id: int) -> None:
    """List every region: its ID, size in bytes, and names."""
    with _handle(address, provider_id) as target:
        for region in target.list():
            try:
                found = target.stat(region)
            except InvalidRegion:
                continue  # erased meanwhile
            line = f"{region.hex()} {found.size:>14} {' '.join(found.names)}".rstrip()
            click.echo(os.fsencode(line))  # names may have any bytes


@main.command()
@_target
@click.argument("file", type=click.File("rb"), default="-")
@click.option("-n", "--name", help="Give the region this path in the tree of names.")
def put(address: str, provider_id: int, file: Any, name: str | None) -> None:
    """Store FILE, or standard input, as a new region, durably; prints its ID."""
    with _handle(address, provider_id) as target:
        region = target.create_and_write(file.read(), persist=True)
        if name:
            try:
                target.link_name(region, name)
                target.persist(region, 0, 0)
            except BaseException:
                target.erase(region)
                raise
        click.echo(region.hex())


@main.command()
@_target
@click.argument("region")
@click.argument("file", type=click.File("wb"), default="-")
def get(address: str, provider_id: int, region: str, file: Any) -> None:
    """Write a region, by its ID or its path, to FILE or standard output."""
    with _handle(address, provider_id) as target:
        found = target.open_name(region) if region.startswith("/") else _region(region)
        size = target.size(found)
        step = 8 * 1024 * 1024
        for offset in range(0, size, step):
            file.write(target.read(found, offset, min(step, size - offset)))


@main.command()
@_target
@click.argument("region")
def rm(address: str, provider_id: int, region: str) -> None:
    """Erase a region by its ID, or remove a name by its path."""
    with _handle(address, provider_id) as target:
        if region.startswith("/"):
            target.unlink_name(region)
        else:
            target.erase(_region(region))
