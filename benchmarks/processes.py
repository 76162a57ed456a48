"""Context managers that run providers, compared systems and commands as subprocesses."""

from __future__ import annotations

import contextlib
import json
import os
import select
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
PATIENCE = 60.0
"""Seconds after which what should have answered counts as hung."""


class Failed(Exception):
    """A command did not do what it should."""


def environment() -> dict[str, str]:
    """For processes that import this checkout."""
    path = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH", "")]))
    return {**os.environ, "PYTHONPATH": path, "LC_ALL": "C.UTF-8"}


def run(*command: str | Path, timeout: float = PATIENCE) -> str:
    """What a command prints.

    Raises:
        Failed: its exit status is not 0, or it took too long; it was killed then.
    """
    words = [str(word) for word in command]
    try:
        done = subprocess.run(
            words, capture_output=True, text=True, stdin=subprocess.DEVNULL,
            timeout=timeout, env=environment(), check=False,
        )  # fmt: skip
    except subprocess.TimeoutExpired:
        raise Failed(f"{words[0]}: not done in {timeout:.0f} s") from None
    if done.returncode:
        last = (done.stderr.strip() or done.stdout.strip() or "no message").splitlines()[-1]
        raise Failed(f"{' '.join(words[:4])}: exit status {done.returncode}: {last}")
    return done.stdout


def run_module(module: str, *arguments: str | Path, timeout: float = PATIENCE) -> Any:
    """What a module of this package prints, which is JSON."""
    return json.loads(run(sys.executable, "-m", module, *arguments, timeout=timeout))


@contextlib.contextmanager
def running(
    command: Sequence[str | Path], executable: str | None = None
) -> Iterator[subprocess.Popen[str]]:
    """Run a process with pipes to its standard input and output; SIGTERM when the block ends."""
    process = subprocess.Popen(
        [str(word) for word in command], executable=executable, text=True, env=environment(),
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL,
    )  # fmt: skip
    try:
        yield process
    finally:
        process.terminate()
        try:
            process.communicate(timeout=10)
        except (subprocess.TimeoutExpired, ValueError):
            process.kill()
            process.communicate()


def line_of(process: subprocess.Popen[str], patience: float = PATIENCE) -> str:
    """The next line that a process prints.

    Raises:
        Failed: it ended, or printed nothing for *patience* seconds.
    """
    assert process.stdout is not None
    ready, _, _ = select.select([process.stdout], [], [], patience)
    text = process.stdout.readline().strip() if ready else ""
    if not text:
        raise Failed(f"{process.args!r} does not answer")
    return text


@contextlib.contextmanager
def provider(
    transport: str, configs: Sequence[dict[str, Any]], command: str = "warabi.tools.cli.main"
) -> Iterator[tuple[str, subprocess.Popen[str]]]:
    """Address and process of ``warabi serve`` with providers 1, 2, ... of these configurations.

    Args:
        command: the module whose ``main`` is the command ``warabi``.
    """
    with tempfile.TemporaryDirectory(prefix="warabi-bench") as directory:
        service = Path(directory, "service.json")
        providers = [
            {"name": f"p{i}", "type": "warabi", "provider_id": i, "config": config}
            for i, config in enumerate(configs, 1)
        ]
        service.write_text(json.dumps({"providers": providers}))
        serve = f"from {command} import main; main()"
        words = [sys.executable, "-c", serve, "serve", "-a", transport, str(service)]
        with running(words) as process:
            yield line_of(process), process


@contextlib.contextmanager
def scratch(parent: Path) -> Iterator[Path]:
    """A new directory in *parent*, removed with all that is in it."""
    parent.mkdir(parents=True, exist_ok=True)
    path = Path(tempfile.mkdtemp(prefix="bench-", dir=parent))
    try:
        yield path
    finally:
        shutil.rmtree(path, ignore_errors=True)
