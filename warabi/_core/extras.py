"""Loads the parts that need packages beyond those of the client, which are installed as extras."""

from __future__ import annotations

import importlib
import sys
from types import ModuleType

from warabi.errors import ConfigError


def load(module: str, extra: str) -> ModuleType:
    """Import a module of this distribution that needs the packages of an extra.

    Raises:
        ConfigError: a package is missing; the message says what to install.
    """
    try:
        return importlib.import_module(module)
    except ModuleNotFoundError as error:
        package = (error.name or "").partition(".")[0]
        if package in ("", "warabi", "warabifs", "mochi"):
            raise
        raise ConfigError(
            f"the package {package} is missing; install it with: pip install 'warabifs[{extra}]'"
        ) from None


def run(command: str, module: str, extra: str) -> None:
    """Run ``main()`` of a module as a command, or say on standard error what to install."""
    try:
        main = load(module, extra).main
    except ConfigError as error:
        sys.exit(f"{command}: {error}")
    main()
