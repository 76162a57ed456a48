"""Manual pages of commands, made of what ``--help`` shows."""

from __future__ import annotations

import re
from collections.abc import Iterator

import click

import warabi
from warabi.tools.cli.common import CONNECTING, Commands

_EXIT = """\
.SH EXIT STATUS
0; 1, with one line on standard error, when the command failed; 2 when the command line is wrong;
130 at Ctrl\\-C; 141, silently, when the reader of the output has closed it.
"""


def roff(text: str) -> str:
    """Escape *text*."""
    escaped = text.replace("\\", "\\e").replace("-", "\\-")
    return f"\\&{escaped}" if escaped.startswith((".", "'")) else escaped


def page(commands: Commands, see_also: str) -> str:
    """Return the manual page of a program with all its commands; *see_also* are other pages."""
    program = commands.program
    ctx = click.Context(commands, info_name=program)
    summary, *text = _paragraphs(commands)
    subcommands = list(_subcommands(commands, ctx))
    reaching = [one for one in subcommands if any(p.name in CONNECTING for p in one[0].params)]
    return "".join((
        f'.TH {program.upper()} 1 "" "warabifs {warabi.__version__}" "User Commands"\n',
        f".SH NAME\n{program} \\- {roff(summary[0].lower() + summary[1:].rstrip('.'))}\n",
        f".SH SYNOPSIS\n.B {program}\n.RI [ OPTION ...]\n.I COMMAND\n.RI [ ARGUMENT ...]\n",
        ".SH DESCRIPTION\n",
        "".join(f"{paragraph}\n.PP\n" for paragraph in map(roff, text)),
        *_options(commands, ctx),
        ".SH COMMANDS\n",
        *(entry for command, below in subcommands for entry in _entry(command, below)),
        *(('.SH "OPTIONS FOR CONNECTING"\nOf all commands that access a target.\n',
           *_options(*reaching[0], connecting=True)) if reaching else ()),
        _EXIT,
        f".SH SEE ALSO\n{see_also}\n",
    ))  # fmt: skip


def _subcommands(
    group: click.Group, ctx: click.Context
) -> Iterator[tuple[click.Command, click.Context]]:
    """Yield each command, also those of groups in the group."""
    for name in group.list_commands(ctx):
        command = group.get_command(ctx, name)
        assert command is not None
        below = click.Context(command, ctx, info_name=name)
        if isinstance(command, click.Group):
            yield from _subcommands(command, below)
        else:
            yield command, below


def _entry(command: click.Command, ctx: click.Context) -> Iterator[str]:
    yield f'.SS "{roff(ctx.command_path)} {roff(" ".join(command.collect_usage_pieces(ctx)))}"\n'
    yield "".join(f"{paragraph}\n.PP\n" for paragraph in map(roff, _paragraphs(command)))
    yield from _options(command, ctx)


def _paragraphs(command: click.Command) -> list[str]:
    text = (command.help or "").replace("`", "")
    return [re.sub(r"\s+", " ", paragraph).strip() for paragraph in text.split("\n\n")]


def _options(command: click.Command, ctx: click.Context, connecting: bool = False) -> Iterator[str]:
    """Yield the options of a command; those for *connecting* are the same for all, or left out."""
    for option in command.params:
        if isinstance(option, click.Option) and (option.name in CONNECTING) == connecting:
            left, right = option.get_help_record(ctx) or ("", "")
            yield f'.TP\n.B "{roff(left)}"\n{roff(right)}\n'
