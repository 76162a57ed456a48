"""What the modules of the ``warabi`` command share."""

from __future__ import annotations

import contextlib
import errno
import sys
from collections.abc import Iterator
from typing import Any

import click

from warabi.errors import Exception


@contextlib.contextmanager
def one_line() -> Iterator[None]:
    """End the command with status 1 and one line when the block fails as commands may fail."""
    try:
        yield
    except (Exception, OSError) as error:
        if isinstance(error, OSError) and error.errno == errno.EPIPE:
            raise  # nobody reads any more; click ends quietly
        sys.exit(f"warabi: {error}")


_FILES = {
    "token_file": "A token that both sides have to know.",
    "tls_cert": "With TLS: this side's certificate, PEM.",
    "tls_key": "The certificate's key.",
    "tls_ca": "The certificate of who signs both sides'.",
}


def secured(function: Any, variables: bool) -> Any:
    """The options for what is shown to the other side, and demanded of it."""
    for name, words in reversed(_FILES.items()):
        variable = f"WARABI_{name.upper()}" if variables else None
        option = click.option(
            f"--{name.replace('_', '-')}", metavar="FILE", default="", envvar=variable,
            help=words, show_envvar=variables,
        )  # fmt: skip
        function = option(function)
    return function


def reaching(function: Any) -> Any:
    """The options that say which provider, and how to reach it."""
    option = click.option("-p", "--provider-id", type=int, default=0, show_default=True)
    return option(authenticated(function))


def authenticated(function: Any) -> Any:
    """The options that say how to reach a provider."""
    name = click.option("--tls-name", metavar="NAME", default="", envvar="WARABI_TLS_NAME",
                        help="The name in the server's certificate, if not the address's host.",
                        show_envvar=True)  # fmt: skip
    return secured(name(function), True)
