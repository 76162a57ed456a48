"""The ``warabi`` command: serves targets, and accesses them.

Every command exits with 0, or with 1 and one line on standard error; with 2 and a hint if the
command line is wrong; with 130 when interrupted; and silently with 141 when the reader of its
output has closed it.
"""

from __future__ import annotations

import contextlib
import json
import logging
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

import warabi
from warabi._core.json_log import FORMATS
from warabi.errors import ConfigError
from warabi.tools.cli.common import Commands, authenticated, echo, logging_options, secured

if TYPE_CHECKING:
    from warabi.bedrock import Server  # slow to import, and not needed by other commands


def _serving(function: Any) -> Any:
    """Add the options for authentication of clients."""
    reading = click.option("--read-only-token-file", metavar="FILE", default=None,
                           help="The token for read-only clients.")  # fmt: skip
    insecure = click.option("--insecure", is_flag=True,
                            help="Listen beyond loopback without authentication.")  # fmt: skip
    return secured(reading(insecure(function)), False)


_PACKAGE = "warabi.tools.cli"
_ELSEWHERE = {
    "names": "ls stat cat mkdir mv rm du df info", "copies": "cp sync", "regions": "put get clone",
    "stats": "stats top", "bench": "bench", "check": "scrub fsck", "archive": "export import",
    "config": "config", "completion": "completion",
}  # fmt: skip
"""The commands that are defined in other modules of this package."""


@click.group(
    cls=Commands,
    modules={name: f"{_PACKAGE}.{module}" for module, names in _ELSEWHERE.items()
             for name in names.split()},
)  # fmt: skip
@click.version_option(warabi.__version__, prog_name="warabi")
@logging_options
def main() -> None:
    """Serve Warabi targets, and access them.

    A LOCATION is an engine's address, as ADDRESS, ADDRESS/PROVIDER or ADDRESS/PROVIDER/PATH, a URL
    warabi://HOST:PORT/PROVIDER/PATH, the path of a target in files, a path on a mount, or a path
    behind a colon, in the target that the variable WARABI_ADDRESS names.
    """


@main.command(context_settings={"auto_envvar_prefix": "WARABI_SERVE"})
@click.argument("config", required=False, metavar="CONFIG", type=click.Path(path_type=Path),
                envvar="WARABI_SERVE_CONFIG")  # fmt: skip
@click.option("-a", "--address", default="na+sm", show_default=True, help="Where to listen.")
@click.option("--address-file", metavar="FILE", type=click.Path(path_type=Path),
              help="Write the address to FILE while serving.")  # fmt: skip
@click.option("--metrics", metavar="HOST:PORT",
              help="Serve metrics for Prometheus there, at /metrics.")  # fmt: skip
@click.option("--http", metavar="HOST:PORT", help="Serve a status page there.")
@click.option("--log-format", type=click.Choice(FORMATS), default="text", show_default=True,
              help="How messages are written to standard error.")  # fmt: skip
@click.option("-t", "--target", metavar="TARGET",
              help="Serve only this target, created if missing: memory:, file:PATH or"
              " rados:POOL/NAME.")  # fmt: skip
@click.option("-p", "--provider-id", type=int, help="The provider ID of that target (default 0).")
@_serving
def serve(
    config: Path | None,
    address: str,
    address_file: Path | None,
    target: str | None,
    provider_id: int | None,
    metrics: str | None,
    http: str | None,
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
    from warabi._core.json_log import JsonFormatter
    from warabi.engine import state_of
    from warabi.eventloop import gc_pauses, state_dump
    from warabi.monitoring import monitored
    from warabi.protocol.auth import config_of

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
        stack.enter_context(
            monitored(loop.report, loop.totals, loop.security, metrics=metrics, http=http)
        )
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
    if backend is None or not backend.spelled or backend.placed != bool(path):
        expected = " or ".join(registry.spellings("PATH"))
        raise ConfigError(f"target {target!r}: expected {expected}")
    settings = {"type": kind, "config": backend.spelled_settings(path, create=True)}
    provider = {"type": "warabi", "provider_id": provider_id, "config": {"target": settings}}
    return Server(address, {"providers": [provider]}, engine)


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
    from warabi.tools.access import client_engine
    from warabi.tools.migrate import ask
    from warabi.tools.progress import overall_progress

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
