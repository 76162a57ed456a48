"""``warabi config``: configurations of services, checked without serving them."""

from __future__ import annotations

import json
from pathlib import Path

import click

from warabi.tools.cli.common import echo


@click.group()
def config() -> None:
    """Check configurations of services, and describe them."""


@config.command()
@click.argument("file", metavar="CONFIG", type=click.Path(path_type=Path))
def check(file: Path) -> None:
    """Check CONFIG, a file that `warabi serve` shall read, and open no target.

    Prints the keys that are accepted but have no effect, and nothing else if it is correct.
    """
    from warabi import bedrock
    from warabi.target.config import read_file

    for key in bedrock.check(read_file(file)):
        echo(f"$.{key} is accepted but has no effect")


@config.command()
def schema() -> None:
    """Print the JSON Schema of configurations, for editors and other programs."""
    from warabi import bedrock

    echo(json.dumps(bedrock.json_schema(), indent=2))
