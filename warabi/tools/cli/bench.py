"""``warabi bench``: how fast files are written and read."""

from __future__ import annotations

import click

from warabi._core.units import shown_bytes, shown_seconds
from warabi.errors import ConfigError
from warabi.tools.bench import Settings, directory, measure
from warabi.tools.cli.common import LOCATION, as_json, echo, locating, print_json_list
from warabi.tools.trees import Trees

_COUNT = click.IntRange(min=1)


@click.command()
@locating()
@click.argument("location", default=":", type=LOCATION)
@click.option("--large", type=_COUNT, default=256, show_default=True, metavar="MIB",
              help="The size of a large file.")  # fmt: skip
@click.option("--small", type=_COUNT, default=16, show_default=True, metavar="KIB",
              help="The size of a small file.")  # fmt: skip
@click.option("--files", type=_COUNT, default=1000, show_default=True,
              help="How many small files a thread writes.")  # fmt: skip
@click.option("--threads", type=click.IntRange(1, 64), default=1, show_default=True)
@click.option("--persist", is_flag=True, help="Count the time until data are on stable storage.")
@as_json
def bench(
    trees: Trees, location: str, large: int, small: int, files: int, threads: int, persist: bool,
    json: bool,
) -> None:  # fmt: skip
    """Measure how fast files are written, read and removed in LOCATION.

    LOCATION is a directory of a target, or on the local disk; a path on a mount is measured through
    the engine.  The files are in a directory of their own, which is removed.  What is read was
    written just before, and so is usually in memory.
    """
    tree, found = trees.find(location)
    settings = Settings(large << 20, small << 10, files, threads, persist)
    if small > 1024:
        raise ConfigError(f"--small {small}: at most 1024 KiB")
    with directory(tree, found.path or "/") as path:
        results = measure(tree, path, settings)
        if json:
            print_json_list(result._asdict() for result in results)
            return
        echo(f"{'':<12} {'files/s':>9} {'a file':>9} {'bytes/s':>9}")
        for name, number, size, seconds in results:
            each, rate = shown_seconds(seconds / number), shown_bytes(size / seconds)
            echo(f"{name:<12} {number / seconds:>9.0f} {each:>9} {rate if size else '':>9}")
