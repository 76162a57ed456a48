"""The table of front ends, with the abilities of each.

Known without importing them: the library of one may be missing.
"""

from __future__ import annotations

import importlib
from dataclasses import dataclass

from warabi.errors import ConfigError
from warabifs.frontends.base import Ability, FrontEnd


@dataclass(frozen=True)
class Entry:
    """One front end.

    Attributes:
        module: where its class is.
        name: of the class.
        abilities: what it can do; some of it needs a recent kernel, too.
        package: the package that it needs, an extra of ours under the same name; empty for none.
    """

    module: str
    name: str
    abilities: frozenset[Ability]
    package: str = ""

    def load(self) -> type[FrontEnd]:
        """The class.

        Raises:
            ConfigError: its package is not installed, or does not work.
        """
        try:
            found: type[FrontEnd] = getattr(importlib.import_module(self.module), self.name)
        except ImportError as error:
            if not self.package:
                raise
            raise ConfigError(
                f"option frontend={self.package}: {error}; install it with: pip install"
                f" 'warabifs[{self.package}]' (which needs libfuse3-dev, pkg-config and a compiler)"
            ) from None
        return found


DEFAULT = "kernel"
FRONT_ENDS: dict[str, Entry] = {
    DEFAULT: Entry("warabifs.frontends.kernel.frontend", "KernelFrontEnd", frozenset(Ability)),
    "pyfuse3": Entry(
        "warabifs.frontends.pyfuse3.frontend",
        "Pyfuse3FrontEnd",
        frozenset((Ability.DIRECT_IO, Ability.WRITEBACK)),
        "pyfuse3",
    ),
}
