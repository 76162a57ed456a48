"""Counts of operations of the API and of a mount, and their comparison with a baseline."""

from __future__ import annotations

import contextlib
import json
import sys
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

from benchmarks import places
from benchmarks.api import Progress
from benchmarks.load import RELISTED
from benchmarks.mounts import make_tree
from benchmarks.places import ours, place
from benchmarks.processes import line_of, provider, run, run_module, running, scratch
from benchmarks.strace import EVENTFD, Account, account, traced
from benchmarks.subjects import BACKENDS, MEMORY, file_config
from benchmarks.traced import RESTED, times

Counts = dict[str, float]
"""Counts for one operation, by names such as "API, memory, TCP: erase: messages"."""

GROSS = 2.0
SLACK = 0.5
"""A count that is more than GROSS times its baseline, and by more than SLACK, is a regression."""
_SENDS = ("sendmsg", "sendto", "send")
_WAITS = ("epoll_wait", "epoll_ctl", "futex", EVENTFD)
"""System calls that block until a message arrives, and that wake a blocked thread.

Between requests in close succession it depends on timing whether a process blocks.  So these calls
count only where the process that gets a request is blocked.
"""


def _of_section(done: Account, section: str, pid: int) -> Counter[str]:
    """System calls of a process in a section; its threads are those that are not traced alone."""
    leave_out = () if section.endswith(RESTED) else _WAITS
    found: Counter[str] = Counter()
    for (where, thread, name), count in done.calls.items():
        if where != section or name in leave_out:
            continue
        if thread == pid or Path(f"/proc/{pid}/task/{thread}").exists():
            found[name] += count
    return found


@contextlib.contextmanager
def _ways(directory: Path) -> Iterator[list[tuple[str, list[str], list[int]]]]:
    """Name, arguments of :mod:`benchmarks.traced`, and the provider's process if it is another."""
    with contextlib.ExitStack() as stack:
        found: list[tuple[str, list[str], list[int]]] = []
        for backend in BACKENDS:
            found.append((f"{backend}, same process", [backend, str(directory)], []))
        for way, transport in (("two processes", "na+sm"), ("TCP", "tcp")):
            configs = [MEMORY, file_config(directory / transport)]
            serving = provider(transport, configs, "benchmarks.steady")
            address, process = stack.enter_context(serving)
            for number, backend in enumerate(BACKENDS, 1):
                words = [backend, str(directory), address, str(number)]
                found.append((f"{backend}, {way}", words, [process.pid]))
        yield found


def count_api(directory: Path, say: Progress) -> Counts:
    """System calls of the client's process and of the provider's, and messages sent by the
    client, for one operation."""
    counts: Counts = {}
    with _ways(directory) as ways:
        for name, words, others in ways:
            say(f"counts: API, {name}")
            log = directory / "strace"
            with running([sys.executable, "-m", "benchmarks.traced", *words]) as process:
                line_of(process)
                assert process.stdin is not None
                with traced(log, process.pid, *others):
                    process.stdin.write("go\n")
                    process.stdin.flush()
                    line_of(process)
                done = account(log)
                for section in done.sections:
                    key = f"API, {name}: {section}"
                    calls = _of_section(done, section, process.pid)
                    # In how many pieces TCP hands over what is large is a matter of moments.
                    steady = not (name.endswith("TCP") and section.endswith(("KiB", "MiB")))
                    if steady:
                        counts[f"{key}: system calls"] = calls.total() / times(section)
                    for other in others:
                        if steady:
                            served = _of_section(done, section, other)
                            total = served.total() / times(section)
                            counts[f"{key}: system calls of the provider"] = total
                        sent = sum(calls[each] for each in _SENDS)
                        counts[f"{key}: messages"] = sent / times(section)
    return counts


def count_mount(directory: Path, say: Progress) -> Counts:
    """FUSE requests and system calls of a mount of a target in memory."""
    counts: Counts = {}
    files, mib, entries, tree = 200, 16, 1000, 200
    with (
        scratch(places.SHM) as memory,
        place(places.OURS, memory, directory) as mount,
    ):
        archive = memory / "tree.tar"
        make_tree(archive, tree)
        load = ["benchmarks.load", "listing", str(mount.path), str(entries)]
        run_module(*load)  # makes the entries
        again = ["benchmarks.load", "relisted", str(mount.path), str(entries)]
        run_module(*again)  # makes others, and lists them
        works = {
            "small file made, written, looked at and removed": (["small", files], files),
            "MiB written twice and read three times": (["streams", mib << 20], mib),
            "4 KiB read or written with O_DIRECT": (["direct", files], 2 * files),
            "entry listed with attributes": (["listing", entries], entries),
            "entry listed again by ls -l": (["relisted", entries], RELISTED * entries),
            "file of a tar archive": ([], tree),
        }
        for name, (words, per) in works.items():
            say(f"counts: mount, {name}")
            log = directory / "strace"
            with traced(log, *mount.pids):
                if words:
                    run_module("benchmarks.load", str(words[0]), mount.path, str(words[1]))
                else:
                    run("tar", "-xf", archive, "-C", mount.path)
            done = account(log)
            key = f"mount, {name}"
            counts[f"{key}: system calls"] = done.calls.total() / per
            counts[f"{key}: FUSE requests"] = done.requests.total() / per
            for kind, count in sorted(done.requests.items()):
                if count >= per / 10:
                    counts[f"{key}: {kind}"] = count / per
    return counts


def count_locks(directory: Path, say: Progress) -> Counts:
    """Messages of one of two mounts to their provider for an uncontended lock."""
    say("counts: locks of two mounts")
    pairs, log = 200, directory / "strace"
    with contextlib.ExitStack() as stack:
        memory = stack.enter_context(scratch(places.SHM))
        address, _ = stack.enter_context(provider("tcp", [MEMORY]))
        one, other = (
            stack.enter_context(ours(name, address, memory / name, "provider_id=1"))
            for name in ("one", "other")
        )
        for mount in other, one:
            run_module("benchmarks.load", "locks", mount.path, "1")
        with traced(log, *one.pids):
            run_module("benchmarks.load", "locks", one.path, str(pairs))
    sent = sum(count for (_, _, call), count in account(log).calls.items() if call in _SENDS)
    return {"mounts of one provider, lock taken and released: messages": sent / pairs}


def count(directory: Path, say: Progress) -> Counts:
    """Everything that is counted, rounded so that a committed baseline is readable."""
    found = count_api(directory, say) | count_mount(directory, say) | count_locks(directory, say)
    return {name: round(value, 2) for name, value in found.items()}


def regressions(counts: Counts, baseline: Counts) -> list[str]:
    """One line for each count that grew grossly, or is not there any more.

    What the baseline does not have is new, and no regression.
    """
    found = []
    for name, before in baseline.items():
        now = counts.get(name)
        if now is None:
            if ": FUSE requests" in name or ": system calls" in name:
                found.append(f"{name}: {before:g} in the baseline, not counted now")
        elif now > GROSS * before and now > before + SLACK:
            found.append(f"{name}: {now:g}, {now / max(before, 0.01):.1f} times {before:g}")
    return found


def read_baseline(path: Path) -> Counts:
    found: Counts = json.loads(path.read_text())
    return found


def write_baseline(path: Path, counts: Counts) -> None:
    path.write_text(json.dumps(counts, indent=2, sort_keys=True) + "\n")
