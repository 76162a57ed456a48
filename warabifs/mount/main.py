"""``mount.warabifs``: check, fork, mount, serve, and exit with everything persisted.

The fork comes first, since neither Trio nor SQLite survive one.  The parent waits until the child
has mounted, calls statfs on the mount, and exits with 0 only if that succeeds.
"""

from __future__ import annotations

import argparse
import contextlib
import errno
import logging
import logging.handlers
import os
import signal
import stat
import subprocess
import sys
import threading
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager
from pathlib import Path
from typing import IO, Any, NoReturn

import trio

import warabi
from warabi import aio, reconnect
from warabi._core import descriptors
from warabi._core.json_log import JsonFormatter
from warabi._core.mountinfo import device_number, identity
from warabi._core.tuning import MOUNT_ANSWER, MOUNT_PATIENCE
from warabi.backends.memory_budget import physical_memory
from warabi.errors import ConfigError, Exception, PermissionDenied
from warabi.eventloop import gc_pauses, inline_wait, loop_watchdog, state_dump
from warabi.monitoring import monitored
from warabi.protocol.auth import config_of, from_config
from warabi.target import opening
from warabi.target.config import checked
from warabi.target.state import LOOPS
from warabi.target.target import Target
from warabifs.frontends.base import Ability, FrontEnd, Settings
from warabifs.frontends.device import READ_AHEAD, READ_AHEAD_REMOTE, Device
from warabifs.frontends.registry import FRONT_ENDS
from warabifs.fs.filesystem import FileSystem
from warabifs.fs.invalidator import Follower
from warabifs.fs.owner_override import ShownLink
from warabifs.fs.report_file import ReportFiles
from warabifs.mount import utab
from warabifs.mount.options import (
    LOCAL_LOCKS,
    Options,
    Source,
    help_text,
    parse_options,
    parse_source,
)
from warabifs.mount.remount import remount
from warabifs.mount.report import MountReport
from warabifs.mount.shutdown_socket import ShutdownSocket
from warabifs.mount.unmount import find
from warabifs.mount.watchdog import Watchdog

log = logging.getLogger("warabifs")

_DAY = 86400.0
_DETACH = 'exec 3<"$1" && fusermount3 -u -z "$1" && { sync -f /dev/fd/3; true; }'


def main(arguments: Sequence[str] | None = None, *, helper: bool = False) -> None:
    """Run the command; exits with 0 when the mount is usable, or with 1 and one line on stderr.

    As mount(8)'s *helper*, ``-f`` means what it means for mount(8): check, but do not mount.
    """
    parsed = _parser(helper).parse_intermixed_args(arguments)
    if parsed.namespace:
        _enter(parsed.namespace, sys.argv[1:] if arguments is None else arguments, helper)
    try:
        options = parse_options(
            parsed.option, root=os.geteuid() == 0, sloppy=parsed.sloppy, helper=helper
        )
        options.read_only = options.read_only or parsed.read_only
        if options.remount:
            _remount(parsed.mountpoint, options)
            return
        source = parse_source(parsed.source, create=options.create)
        if options.passthrough and not source.embedded:
            raise ConfigError("option passthrough: only for embedded targets, memory: or file:")
        if options.size is not None and (
            source.backend is None or source.backend.in_memory is None
        ):
            raise ConfigError("option size: only for memory:")
        FRONT_ENDS[options.frontend].load()  # raises ConfigError if its package is missing
        mountpoint = _check_mountpoint(parsed.mountpoint)
        _check_device()
        if parsed.fake:
            return
        if parsed.foreground:
            _log_to(options, foreground=True)
            _serve(source, mountpoint, options, lambda: None)
        else:
            _serve_in_background(source, mountpoint, options)
    except Exception as error:
        line = str(error).replace("\n", "\\n")
        sys.exit(f"mount.warabifs: {line}")


def _parser(helper: bool) -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="mount.warabifs",
        usage="%(prog)s SOURCE MOUNTPOINT [-f] [-r] [-o OPTION[,OPTION...]]",
        description="Show every region of a Warabi target as a file.",
        epilog="options of -o:\n" + help_text() + "\n\nUnmount with: umount MOUNTPOINT, or"
        " fusermount3 -u MOUNTPOINT",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "source", metavar="SOURCE", help="memory:, file:/path, na+sm://PID-N or ofi+tcp://HOST:PORT"
    )
    parser.add_argument("mountpoint", metavar="MOUNTPOINT", help="an existing directory")
    parser.add_argument("-o", dest="option", action="append", default=[], metavar="OPTION")
    parser.add_argument(
        "-f", dest="fake" if helper else "foreground", action="store_true",
        help="check everything, but do not mount" if helper else "stay in the foreground",
    )  # fmt: skip
    parser.add_argument(
        "--foreground", action="store_true", help="stay in the foreground, also under mount(8)"
    )
    parser.add_argument("-r", dest="read_only", action="store_true", help="same as -o ro")
    parser.add_argument("-s", dest="sloppy", action="store_true", help="ignore unknown options")
    # Further flags that mount(8) passes to every helper.
    for flag in ("-w", "-n", "-v"):
        parser.add_argument(flag, action="store_true", dest="_" + flag[1:], help=argparse.SUPPRESS)
    parser.add_argument("-t", dest="_t", help=argparse.SUPPRESS)
    parser.add_argument("-N", dest="namespace", help=argparse.SUPPRESS)
    parser.add_argument(
        "-V", "--version", action="version", version=f"warabifs {warabi.__version__}"
    )
    parser.set_defaults(fake=False)
    return parser


def _enter(namespace: str, arguments: Sequence[str], helper: bool) -> NoReturn:
    """Start again in another mount namespace; this Python must exist there, too."""
    rest = list(arguments)
    at = next(n for n, word in enumerate(rest) if word.startswith("-N"))
    del rest[at : at + (2 if rest[at] == "-N" else 1)]
    module = ["warabifs.mount.helper", "mount"] if helper else ["warabifs.mount.main"]
    python = [sys.executable, "-P", "-m", *module, *rest]
    os.execvp("nsenter", ["nsenter", f"--mount={namespace}", "--", *python])


def _remount(text: str, options: Options) -> None:
    path = find(text).path
    remount(path, options.flags, read_only=options.read_only)
    ignored = [item for item in options.fixed if item not in ("allow_other", "noallow_other")]
    if ignored:
        print(
            f"mount.warabifs: {path}: remount does not change these options: {', '.join(ignored)}",
            file=sys.stderr,
        )


def _check_mountpoint(text: str) -> str:
    """Return the absolute path of a directory that is not a mount point; removes a dead mount."""
    path = os.path.abspath(text)
    try:
        os.statvfs(path)  # unlike stat, never answered from the kernel's cache of a dead mount
        mode = os.stat(path).st_mode
    except FileNotFoundError:
        raise ConfigError(f"mount point {path}: does not exist") from None
    except OSError as error:
        if error.errno not in (errno.ENOTCONN, errno.ECONNABORTED):
            raise ConfigError(f"mount point {path}: {error.strerror}") from None
        # Left behind by a killed mount.
        done = subprocess.run(
            ["fusermount3", "-u", "-z", path], capture_output=True, text=True, timeout=MOUNT_ANSWER
        )
        if done.returncode:
            raise ConfigError(
                f"mount point {path}: a dead mount that cannot be removed: {done.stderr.strip()}"
            ) from None
        return _check_mountpoint(text)
    if not stat.S_ISDIR(mode):
        raise ConfigError(f"mount point {path}: is not a directory")
    if os.path.ismount(path):
        raise ConfigError(f"mount point {path}: already a mount point")
    return os.path.realpath(path)  # as in the kernel's mount table


def _check_device() -> None:
    if not Path("/dev/fuse").exists():
        raise ConfigError("/dev/fuse does not exist: load the kernel module fuse (modprobe fuse)")
    if not os.access("/dev/fuse", os.R_OK | os.W_OK):
        raise PermissionDenied("/dev/fuse: this user may not open it (its mode is usually 0666)")


def _serve_in_background(source: Source, mountpoint: str, options: Options) -> None:
    """Fork; the parent returns when the mount responds."""
    receiving, sending = os.pipe()
    child = os.fork()
    if child == 0:
        os.close(receiving)
        with open(sending, "w", encoding="utf-8", errors="surrogateescape") as pipe:
            os._exit(_child(source, mountpoint, options, pipe))
    os.close(sending)
    with open(receiving, encoding="utf-8", errors="surrogateescape") as pipe:
        status = pipe.read()
    if status != "ready":
        raise ConfigError(status or "the mount process ended without reporting an error")
    try:
        # Another process must do it: this one could wait for itself.
        done = subprocess.run(["stat", "-f", mountpoint], capture_output=True, timeout=MOUNT_ANSWER)
    except subprocess.TimeoutExpired:
        raise ConfigError(f"mount point {mountpoint}: the mount does not answer") from None
    if done.returncode:
        raise ConfigError(
            f"mount point {mountpoint}: {done.stderr.decode(errors='replace').strip()}"
        )


def _child(source: Source, mountpoint: str, options: Options, pipe: IO[str]) -> int:
    os.setsid()
    os.chdir("/")

    def ready() -> None:
        null = os.open(os.devnull, os.O_RDWR)
        for number in (0, 1, 2):
            os.dup2(null, number)
        os.close(null)
        pipe.write("ready")
        pipe.close()

    try:
        _log_to(options, foreground=False)
        _serve(source, mountpoint, options, ready)
        return 0
    except Exception as error:
        return _report(str(error), pipe)
    except BaseException as error:
        return _report(f"{type(error).__name__}: {error}", pipe, exception=error)


def _report(message: str, pipe: IO[str], exception: BaseException | None = None) -> int:
    if pipe.closed:
        log.error("%s", message, exc_info=exception)
    else:
        pipe.write(message)
        pipe.flush()
    logging.shutdown()
    return 1


def _log_to(options: Options, *, foreground: bool) -> None:
    handler: logging.Handler
    try:
        if options.log_file:
            handler = logging.FileHandler(options.log_file)
        elif foreground:
            handler = logging.StreamHandler()
        elif Path("/dev/log").exists():
            handler = logging.handlers.SysLogHandler("/dev/log")
        else:
            handler = logging.NullHandler()
    except OSError as error:
        raise ConfigError(f"log {options.log_file}: {error.strerror}") from None
    form = "warabifs[%(process)d]: %(levelname)s: %(message)s"
    stamped = "%(asctime)s " + form if options.log_file or foreground else form
    is_json = options.log_format == "json"
    handler.setFormatter(JsonFormatter() if is_json else logging.Formatter(stamped))
    logging.basicConfig(level=logging.INFO, handlers=[handler], force=True)


def _serve(source: Source, mountpoint: str, options: Options, ready: Callable[[], None]) -> None:
    """Mount, serve until unmounted or signalled, persist, and report to waiting ``umount``s."""
    shutdown = ShutdownSocket()
    try:
        _serve_and_persist(source, mountpoint, options, ready, shutdown)
    except BaseException as error:
        shutdown.report(str(error) or type(error).__name__)
        raise
    shutdown.report("")


def _serve_and_persist(
    source: Source,
    mountpoint: str,
    options: Options,
    ready: Callable[[], None],
    shutdown: ShutdownSocket,
) -> None:
    descriptors.raise_limit()
    local: Target | None = None
    if source.backend is not None:
        spelled = source.backend.spelled_settings(
            source.place or str(source.path), create=options.create
        )
        local = opening.open_backend(
            source.backend,
            checked(source.backend.config, spelled, what=f"source {source.text}"),
            patience=MOUNT_PATIENCE,
            limit=None if source.backend.in_memory is None else _limit(options),
        )
    gc_pauses.limit_pauses()
    LOOPS.add(threading.get_ident())
    try:
        failure = trio.run(
            _mount_and_serve, source, local, mountpoint, options, ready, shutdown,
            instruments=loop_watchdog.instruments(),
        )  # fmt: skip
    finally:
        LOOPS.discard(threading.get_ident())
        if local is not None:
            local.close()
    if failure is not None:
        raise failure


def _limit(options: Options) -> int | None:
    """Return the most bytes of memory for the files of a ``memory:`` mount, None for no limit: by
    default half of it, as for tmpfs."""
    memory = physical_memory()
    return (memory // 2 if options.size is None else options.size(memory)) or None


@asynccontextmanager
async def _open(
    source: Source, local: Target | None, options: Options
) -> AsyncIterator[aio.Target]:
    if local is not None:
        yield _shown(aio.attach(local), options)
        return
    security = config_of(options.security)
    async with reconnect.connect(
        source.address,
        options.provider_id,
        timeout=options.timeout,
        patience=options.reconnect,
        read_only=options.read_only,
        tls=security.get("tls"),
        token_file=security.get("token_file"),
    ) as target:
        yield _shown(target, options)


def _shown(target: aio.Target, options: Options) -> aio.Target:
    return aio.Target(ShownLink(target.link, options.shown)) if options.shown else target


async def _mount_and_serve(
    source: Source,
    local: Target | None,
    mountpoint: str,
    options: Options,
    ready: Callable[[], None],
    shutdown: ShutdownSocket,
) -> BaseException | None:
    """Serve the mount; returns the error that ended it, None if it was unmounted."""
    try:
        # Installed before the kernel knows of the mount and until everything is persisted: a signal
        # without a receiver would kill the process at once.
        async with (
            _signals() as signals,
            _open(source, local, options) as target,
        ):
            alone = source.embedded or options.exclusive
            # Other clients change what an engine serves: each lookup of a name asks the provider,
            # and brings the size that reading and appending after an open rely on (close-to-open).
            attributes, names, directories = (_DAY, _DAY, _DAY) if alone else (1.0, 0.0, 1.0)
            if options.passthrough:
                attributes = 1.0  # times change when a file is written through a mapping
            attributes = attributes if options.attr_timeout is None else options.attr_timeout
            if options.entry_timeout is not None:
                names = directories = options.entry_timeout
            negative = names if options.negative_timeout is None else options.negative_timeout
            device = _mount(source, mountpoint, options)
            entry = FRONT_ENDS[options.frontend]
            front = entry.load()(device)
            files = FileSystem(
                target,
                exclusive=alone,
                attr_timeout=attributes,
                drop_name=front.drop_name,
                drop_attributes=front.drop_attributes,
                local=local,
                remember_names=names > 0,
                keep_listings=(
                    min(names, directories, attributes)
                    if Ability.CACHE_LISTINGS in entry.abilities
                    else 0.0
                ),
                openless=(
                    local is not None
                    and not options.passthrough
                    and Ability.OPENLESS in entry.abilities
                ),
                location=(
                    source.text if source.embedded else f"{source.address}/{options.provider_id}"
                ),
            )
            report = MountReport(source, mountpoint, options, front, files, target, local)
            files.reports = ReportFiles(os.fsencode(options.stats), report.text)
            files.writes.drop = front.drop_bytes
            files.forget_bytes = front.forget_bytes
            files.pages.notified = source.remote and not alone
            follower = Follower(
                target,
                files,
                forget_inode=front.forget_inode,
                forget_name=front.forget_name,
                new_names=bool(negative),
            )
            settings = Settings(
                attr_timeout=attributes,
                entry_timeout=names,
                directory_timeout=directories,
                negative_timeout=negative,
                direct_io=options.direct_io,
                writeback=options.exclusive,
                passthrough=local if options.passthrough else None,
                # I/O on stable storage in this process cannot be interrupted.
                interruptible=not source.embedded,
                read_ahead=READ_AHEAD_REMOTE if source.remote else READ_AHEAD,
                locks=_locks(alone, options),
            )
            unmount = True
            listed = utab.UtabEntry(options.fsname or source.text, mountpoint)
            try:
                abilities = front.begin(files, settings)
                if options.passthrough and Ability.PASSTHROUGH not in abilities:
                    raise ConfigError(
                        "option passthrough: not supported by this kernel (Linux 6.14 or later is"
                        " required)"
                    )
                try:
                    shutdown.announce(mountpoint)
                except (PermissionDenied, OSError) as error:
                    log.warning("umount will not wait until this process has persisted: %s", error)
                utab.remove_stale()
                listed.add()
                number = device_number(mountpoint)
                token = trio.lowlevel.current_trio_token()
                with (
                    Watchdog(number, identity(number)),
                    state_dump.at_signal(report.own, lambda: {"the mount": token}),
                ):
                    async with (
                        _monitored(report, options),
                        trio.open_nursery() as nursery,
                    ):
                        nursery.start_soon(
                            _end_on_signal, signals, mountpoint, follower, device, front
                        )
                        nursery.start_soon(_accept, shutdown)
                        if not alone:
                            nursery.start_soon(follower.run)
                        ready()
                        with inline_wait.serving(device.fd):
                            await front.serve()
                        unmount = False  # the kernel ended the session: already unmounted
                        nursery.cancel_scope.cancel()
            except Exception:
                raise
            except (ValueError, TimeoutError) as error:
                raise ConfigError(f"mount point {mountpoint}: this kernel: {error}") from error
            finally:
                shutdown.gather()
                listed.remove()
                if local is not None:
                    local.will_close()
                await follower.stop()
                front.close()
                device.close(unmount=unmount)
                with trio.CancelScope(shield=True):
                    await _sync(target, None if source.embedded else options.timeout)
    except BaseExceptionGroup as group:
        return group.exceptions[0]
    except Exception as error:
        return error
    return None


@asynccontextmanager
async def _monitored(report: MountReport, options: Options) -> AsyncIterator[None]:
    """Serve metrics and the status page, if asked for, during the block."""
    token = trio.lowlevel.current_trio_token()

    def make() -> dict[str, Any]:
        return trio.from_thread.run(report.make, trio_token=token)

    security = from_config(config_of(options.security))
    serving = monitored(
        make, report.totals, security, metrics=options.metrics, http=options.http,
        spelling="option {}=",
    )  # fmt: skip
    await trio.to_thread.run_sync(serving.__enter__)
    try:
        yield
    finally:
        with trio.CancelScope(shield=True):
            await trio.to_thread.run_sync(serving.__exit__, None, None, None)


def _locks(alone: bool, options: Options) -> frozenset[str]:
    """Return which locks the provider keeps.  Where no other client has the target, the kernel's
    own are exact, and take no request."""
    if alone or Ability.LOCKS not in FRONT_ENDS[options.frontend].abilities:
        return frozenset()
    return frozenset(LOCAL_LOCKS[options.local_lock or "none"])


def _mount(source: Source, mountpoint: str, options: Options) -> Device:
    fuse = {"default_permissions", *options.fuse}
    if options.read_only:
        fuse.add("ro")
    if options.allow_other:
        fuse.add("allow_other")
    return Device(mountpoint, options.fsname or source.text, fuse)


async def _accept(shutdown: ShutdownSocket) -> None:
    while shutdown.fd >= 0:
        await trio.lowlevel.wait_readable(shutdown.fd)
        shutdown.accept()


async def _sync(target: aio.Target, timeout: float | None) -> None:
    """Sync *target*.  After *timeout* seconds send a second sync, in case the reply was lost, and
    return when either completes; slow storage may take longer than the timeout.

    Raises:
        warabi.errors.Exception: the error of the sync.
    """
    failure: Exception | None = None

    async def sync() -> None:
        nonlocal failure
        try:
            await target.call("sync")
        except Exception as error:
            failure = error
        nursery.cancel_scope.cancel()

    async with trio.open_nursery() as nursery:
        nursery.start_soon(sync)
        if timeout is not None:
            await trio.sleep(timeout)
            nursery.start_soon(sync)
    if failure is not None:
        raise failure


@asynccontextmanager
async def _signals() -> AsyncIterator[trio.MemoryReceiveChannel[signal.Signals]]:
    """Receive the signals that request an exit; signals that are not received are dropped."""
    sending, receiving = trio.open_memory_channel[signal.Signals](1)

    async def receive(task_status: trio.TaskStatus[None]) -> None:
        with trio.open_signal_receiver(signal.SIGTERM, signal.SIGINT, signal.SIGHUP) as signals:
            task_status.started()
            async for number in signals:
                with contextlib.suppress(trio.WouldBlock):
                    sending.send_nowait(signal.Signals(number))

    async with trio.open_nursery() as nursery:
        await nursery.start(receive)
        yield receiving
        nursery.cancel_scope.cancel()


async def _end_on_signal(
    signals: trio.MemoryReceiveChannel[signal.Signals],
    mountpoint: str,
    follower: Follower,
    device: Device,
    front: FrontEnd,
) -> None:
    """Unmount on a signal, so that the kernel flushes its caches before the session ends."""
    async for number in signals:
        log.info("exiting on %s", number.name)
        if await _run("fusermount3", "-u", mountpoint) == 0:
            if not device.ended:  # another bind mount or mount namespace has it, too
                log.info("%s: unmounting the remaining mounts of this file system", mountpoint)
                await _run("sync")
                await follower.stop()
                front.stop()
            return
        # Busy: programs have files open.  Detach the mount, and flush dirty pages before and after
        # that, since the programs continue to write.
        await _run("sync", "-f", mountpoint)
        if await _run("sh", "-c", _DETACH, "sh", mountpoint) == 0:
            await follower.stop()
            front.stop()
            return


async def _run(*command: str) -> int:
    """Run a command without blocking the event loop, which it needs; return its exit status."""
    with trio.move_on_after(MOUNT_ANSWER):
        done = await trio.run_process(command, check=False, capture_stderr=True)
        if done.returncode:
            log.info("%s: %s", " ".join(command), done.stderr.decode(errors="replace").strip())
        return done.returncode
    return 1


if __name__ == "__main__":
    with contextlib.suppress(KeyboardInterrupt):
        main()
