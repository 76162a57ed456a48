"""``warabi``: look into targets, and serve one.

Every command exits with 0, or with 1 and one line on standard error.
"""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import click

import warabi
from warabi.client import Client, TargetHandle
from warabi.engine import Engine, Mode
from warabi.errors import Exception
from warabi.region import RegionID


@contextlib.contextmanager
def _one_line() -> Iterator[None]:
    try:
        yield
    except Exception as error:
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
    """Serve a Warabi target, and reach one."""


@main.command()
@click.argument("address", default="na+sm")
@click.option("-p", "--provider-id", type=int, default=0, show_default=True)
@click.option("-c", "--config", default='{"target": {"type": "memory"}}', show_default=True,
              help="Provider configuration: JSON text, or @FILE.")  # fmt: skip
@click.option("--address-file", type=click.Path(path_type=Path), help="Write the address there.")
def serve(address: str, provider_id: int, config: str, address_file: Path | None) -> None:
    """Serve one target at ADDRESS until SIGTERM or SIGINT."""
    from warabi.server import Provider

    with _one_line(), Engine(address) as engine:
        try:
            text = Path(config[1:]).read_text() if config.startswith("@") else config
            with Provider(engine, provider_id, text):
                click.echo(str(engine.addr()))
                if address_file is not None:
                    address_file.write_text(f"{engine.addr()}\n")
                engine.wait_for_finalize()
        except OSError as error:
            sys.exit(f"warabi: {error}")


@main.command("ls")
@_target
def list_regions(address: str, provider_id: int) -> None:
    """List every region: its ID, size in bytes, and names."""
    with _handle(address, provider_id) as target:
        for region in target.list():
            found = target.stat(region)
            click.echo(f"{region.hex()} {found.size:>14} {' '.join(found.names)}".rstrip())


@main.command()
@_target
@click.argument("file", type=click.File("rb"), default="-")
@click.option("-n", "--name", help="Give the region this path in the tree of names.")
def put(address: str, provider_id: int, file: Any, name: str | None) -> None:
    """Store FILE, or standard input, as a new region, durably; prints its ID."""
    with _handle(address, provider_id) as target:
        region = target.create_and_write(file.read(), persist=True)
        if name:
            target.link_name(region, name)
            target.persist(region, 0, 0)
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
