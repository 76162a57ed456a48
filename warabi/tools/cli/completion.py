"""``warabi completion``: completion of commands and options in shells."""

from __future__ import annotations

import os
from pathlib import Path

import click
from click.shell_completion import get_completion_class

from warabi._core.output import write_file
from warabi.errors import ConfigError
from warabi.tools.cli.common import Commands, echo

_DATA = ("XDG_DATA_HOME", "~/.local/share")
_PLACES = {
    "bash": (_DATA, "bash-completion/completions/{0}"),
    "zsh": (_DATA, "zsh/site-functions/_{0}"),
    "fish": (("XDG_CONFIG_HOME", "~/.config"), "fish/completions/{0}.fish"),
}
"""Where each shell looks for the completion of a command: variable and directory, and file."""


@click.command()
@click.argument("shell", type=click.Choice(list(_PLACES)))
@click.option("--install", is_flag=True, help="Write it to where SHELL looks for it.")
@click.pass_context
def completion(ctx: click.Context, shell: str, install: bool) -> None:
    """Print the script that completes commands, options and files in SHELL.

    With --install it is written to a file of this user, which new shells read, and its path is
    printed; zsh reads it if the directory is in its variable fpath.
    """
    root = ctx.find_root().command
    assert isinstance(root, Commands)
    found = get_completion_class(shell)
    assert found is not None
    script = found(root, {}, root.program, f"_{root.program.upper()}_COMPLETE").source()
    if not install:
        echo(script)
        return
    (name, default), file = _PLACES[shell]
    path = Path(os.environ.get(name) or os.path.expanduser(default), file.format(root.program))
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ConfigError(f"{path.parent}: {error.strerror}") from None
    write_file(path, script.encode())
    echo(str(path))
