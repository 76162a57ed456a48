"""Shared helpers of the ``warabi`` command's modules."""

from __future__ import annotations

import contextlib
import errno
import functools
import importlib
import json
import logging
import os
import signal
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from functools import partial
from typing import Any, cast

import click
from click.shell_completion import CompletionItem

from warabi.errors import Exception
from warabi.tools.quoting import printable

INTERRUPTED = 128 + signal.SIGINT
BROKEN_PIPE = 128 + signal.SIGPIPE


def explained(error: BaseException) -> str:
    """Return one line that describes *error*: the library's message, or for an error of the system
    the file, if known, and the system's message."""
    if isinstance(error, OSError) and not isinstance(error, Exception) and error.strerror:
        files = [os.fsdecode(file) for file in (error.filename, error.filename2)
                 if isinstance(file, str | bytes)]  # fmt: skip
        return printable(": ".join([*files, error.strerror]))
    return printable(str(error) or type(error).__name__)


class InputFile(click.File):
    """A file to read bytes from, or - for standard input."""

    def __init__(self) -> None:
        super().__init__("rb")

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        if value == "-" and sys.stdin is None:
            self.fail("standard input is closed", param, ctx)
        return super().convert(value, param, ctx)


@contextlib.contextmanager
def one_line(program: str = "warabi", status: int = 1) -> Iterator[None]:
    """On an expected error in the block, print one line and exit with *status*."""
    try:
        yield
    except (Exception, OSError) as error:
        if isinstance(error, OSError) and error.errno == errno.EPIPE:
            raise  # the reader has closed the pipe: see Commands
        click.echo(f"{program}: {explained(error)}", err=True)
        sys.exit(status)


class Commands(click.Group):
    """Commands with common exit behaviour: one line on failure; silent with status 141, as for
    SIGPIPE, when the reader of the output has closed it; status 130 on Ctrl-C; and cleanup on
    SIGTERM and SIGHUP."""

    program = "warabi"
    unwinds = True
    """Whether SIGTERM and SIGHUP unwind the stack; a command that serves handles them itself."""

    # The modules by the names of their commands are imported when these are needed.
    def __init__(self, *args: Any, modules: Mapping[str, str] | None = None, **rest: Any) -> None:
        super().__init__(*args, **rest)
        self._modules = modules or {}

    def list_commands(self, ctx: click.Context) -> list[str]:
        return sorted([*super().list_commands(ctx), *self._modules])

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        """Return a command; one of *modules* is imported when it is needed."""
        if cmd_name in self._modules:
            module = importlib.import_module(self._modules[cmd_name])
            found = getattr(module, cmd_name, None) or getattr(module, f"{cmd_name}_command")
            return cast(click.Command, found)
        return super().get_command(ctx, cmd_name)

    def main(self, args: Any = None, *rest: Any, standalone_mode: bool = True, **extra: Any) -> Any:
        run = partial(super().main, args, *rest, standalone_mode=False, **extra)
        if not standalone_mode:
            return run()
        try:
            with _ending_on_signals() if self.unwinds else contextlib.nullcontext():
                run()
                flush_output()
        except click.ClickException as error:
            error.show()
            sys.exit(error.exit_code)
        except (click.Abort, KeyboardInterrupt):
            # Another Ctrl-C during the rest of the exit ends it at once, with the same status.
            with contextlib.suppress(ValueError):  # not in the main thread
                signal.signal(signal.SIGINT, lambda number, frame: os._exit(INTERRUPTED))
            _drop_output()
            sys.exit(INTERRUPTED)
        except OSError as error:  # of --help, or when flushing buffered output
            error.filename = error.filename or "standard output"
            _drop_output()
            with one_line(self.program):
                raise
        sys.exit(0)

    def invoke(self, ctx: click.Context) -> Any:
        try:
            with one_line(self.program):
                try:
                    return super().invoke(ctx)
                finally:
                    flush_output()
        except OSError:  # EPIPE, for which click would exit with status 1
            _drop_output()
            sys.exit(BROKEN_PIPE)


def echo(text: str) -> None:
    """Write a line to standard output and flush it; raises ``OSError``."""
    print_lines([os.fsencode(text)])
    flush_output()


def print_lines(lines: Sequence[bytes], end: bytes = b"\n") -> None:
    """Write lines to standard output; raises ``OSError``."""
    stream = sys.stdout
    if stream is None:
        raise OSError(errno.EBADF, os.strerror(errno.EBADF), "standard output")
    with _naming_output():
        stream.buffer.write(b"".join(line + end for line in lines))


def flush_output() -> None:
    """Flush buffered output now: at interpreter exit it is too late to report errors."""
    if sys.stdout is not None:
        with _naming_output():
            sys.stdout.flush()


@contextlib.contextmanager
def _naming_output() -> Iterator[None]:
    try:
        yield
    except OSError as error:
        error.filename = "standard output"
        _drop_output()
        raise


def _drop_output() -> None:
    """Discard buffered output, which would otherwise be written, and fail again, at exit."""
    with contextlib.suppress(OSError, ValueError, AttributeError):
        null = os.open(os.devnull, os.O_WRONLY)
        os.dup2(null, sys.stdout.fileno())
        os.close(null)


@contextlib.contextmanager
def _ending_on_signals() -> Iterator[None]:
    """Let SIGTERM and SIGHUP unwind the stack, unless they are ignored, as under nohup(1)."""

    def end(number: int, frame: object) -> None:
        sys.exit(128 + number)

    old = {}
    for number in (signal.SIGTERM, signal.SIGHUP):
        if signal.getsignal(number) is signal.SIG_DFL:
            with contextlib.suppress(ValueError):  # not in the main thread
                old[number] = signal.signal(number, end)
    try:
        yield
    finally:
        for number, handler in old.items():
            signal.signal(number, handler)


def logging_options(function: Any) -> Any:
    """Add the options that say which messages are logged, on standard error."""

    def level(ctx: click.Context, option: click.Parameter, value: str | int) -> None:
        name = ("WARNING", "INFO", "DEBUG")[min(value, 2)] if isinstance(value, int) else value
        if name and not ctx.resilient_parsing and (isinstance(value, str) or value):
            logging.basicConfig(format="warabi: %(message)s")
            logging.getLogger().setLevel(name.upper())

    verbose = click.option("-v", "--verbose", count=True, callback=level, expose_value=False,
                           help="Log what happens; -vv: details, too.")  # fmt: skip
    names = click.Choice(["debug", "info", "warning", "error"], case_sensitive=False)
    return verbose(
        click.option("--log-level", type=names, callback=level, expose_value=False,
                     envvar="WARABI_LOG_LEVEL", show_envvar=True,
                     help="What is logged; by default warnings.")(function)
    )  # fmt: skip


_FILES = {
    "token_file": "The token shared by both sides.",
    "tls_cert": "With TLS: this side's certificate, PEM.",
    "tls_key": "The certificate's key.",
    "tls_ca": "The certificate of the CA that signs both sides' certificates.",
}


CONNECTING = frozenset((*_FILES, "tls_name", "provider_id"))
"""The parameters that select a provider, and how to connect to it."""


def secured(function: Any, variables: bool) -> Any:
    """Add the options for what is presented to, and required of, the other side."""
    for name, words in reversed(_FILES.items()):
        variable = f"WARABI_{name.upper()}" if variables else None
        option = click.option(
            f"--{name.replace('_', '-')}", metavar="FILE", default=None, envvar=variable,
            help=words, show_envvar=variables,
        )  # fmt: skip
        function = option(function)
    return function


def reaching(function: Any) -> Any:
    """Add the options that select a provider, and how to connect to it."""
    option = click.option("-p", "--provider-id", type=int, default=0, show_default=True,
                          help="The provider, where the location names none.")  # fmt: skip
    return option(authenticated(function))


class LocationType(click.ParamType[str]):
    """A word that :func:`warabi.tools.location.parse` understands."""

    name = "location"

    def shell_complete(
        self, ctx: click.Context, param: click.Parameter, incomplete: str
    ) -> list[CompletionItem]:
        return [CompletionItem(incomplete, type="file")]


LOCATION = LocationType()


def locating(*, read_only: bool = False) -> Callable[[Callable[..., None]], Any]:
    """A decorator that passes :class:`warabi.tools.trees.Trees` as the first argument, and adds the
    options that they need."""

    def decorate(function: Callable[..., None]) -> Any:
        @functools.wraps(function)
        def run(*arguments: Any, provider_id: int, **options: Any) -> None:
            from warabi.tools.trees import Trees

            security = {name: options.pop(name) for name in (*_FILES, "tls_name")}
            with Trees(provider_id, security, read_only=read_only) as trees:
                function(trees, *arguments, **options)

        return reaching(run)

    return decorate


def as_json(function: Any) -> Any:
    """Add the option --json."""
    return click.option("--json", is_flag=True, help="Print JSON.")(function)


def print_json(value: Any) -> None:
    """Print *value* as JSON, in one line."""
    echo(json.dumps(value))


def print_json_list(items: Iterable[Any]) -> None:
    """Print a JSON array with one item in each line."""
    before = b"["
    for item in items:
        print_lines([before + json.dumps(item).encode()], end=b"")
        before = b",\n "
    print_lines([b"[]" if before == b"[" else b"]"])


def authenticated(function: Any) -> Any:
    """Add the options for connecting to a provider."""
    name = click.option("--tls-name", metavar="NAME", default=None, envvar="WARABI_TLS_NAME",
                        help="The name in the server's certificate, if not the address's host.",
                        show_envvar=True)  # fmt: skip
    return secured(name(function), True)
