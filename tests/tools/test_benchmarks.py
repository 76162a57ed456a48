"""The machinery of ``tools/bench``: what it keeps of samples, counts, compares and writes."""

from __future__ import annotations

import json
import math
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from benchmarks import goals, places, report
from benchmarks.counts import GROSS, read_baseline, regressions
from benchmarks.goals import Verdict
from benchmarks.quick import compare
from benchmarks.rows import ROWS, Goal, shown
from benchmarks.stats import Round, Series, Work, measure, percentile
from benchmarks.strace import EVENTFD, MARK, Account
from tests.support.helpers import PATIENCE, ROOT, environment

BASELINE = ROOT / "benchmarks" / "baseline.json"
FUSE = "".join(f"\\x{byte:02x}" for byte in b"/dev/fuse")


def bench(*arguments: str | Path, patience: float = PATIENCE) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "benchmarks", *map(str, arguments)],
        cwd=ROOT, env=environment(), capture_output=True, text=True,
        timeout=patience, check=False,
    )  # fmt: skip


def head(opcode: int) -> str:
    """The head of a FUSE request, as strace shows it."""
    raw = (64).to_bytes(4, "little") + opcode.to_bytes(4, "little")
    return "".join(f"\\x{byte:02x}" for byte in raw)


def escaped(text: str) -> str:
    return "".join(f"\\x{byte:02x}" for byte in text.encode())


def test_a_round_counts_calls_and_does_what_is_around_them_untimed() -> None:
    done: list[str] = []
    work = Work(
        lambda: done.append("call"),
        begin=lambda: done.append("begin"),
        before=lambda: done.append("before"),
        after=lambda: done.append("after"),
        most=3,
    )
    took = measure(work, 10.0)
    assert done == ["begin", *["before", "call"] * 3, "after"]
    assert took.count == 3
    assert 0 < took.value <= took.p99 < 10_000_000
    assert took.cpu == 0


def test_what_is_around_a_call_is_undone_when_the_call_fails() -> None:
    done: list[str] = []

    def fail() -> None:
        raise OSError("no")

    with pytest.raises(OSError, match="no"):
        measure(Work(fail, after=lambda: done.append("after")), 1.0)
    assert done == ["after"]


def test_a_call_of_many_operations_is_divided_among_them() -> None:
    import time

    took = measure(Work(lambda: time.sleep(0.02), per=10, most=2, size=1 << 20), 10.0)
    assert took.value >= 2000
    assert took.p99 >= took.value
    assert 0 <= took.cpu < 0.02 * 1024 * 10


def test_percentiles_are_of_the_samples() -> None:
    ordered = [float(number) for number in range(100)]
    assert percentile(ordered, 0.5) == 50
    assert percentile(ordered, 0.99) == 99
    assert percentile([7.0], 0.99) == 7


def test_series_keep_the_median_of_rounds_and_survive_json() -> None:
    series = Series("row", "us", rounds=[Round(5, 9), Round(1, 2), Round(2, 3)])
    assert series.value == 2
    assert series.p99 == 3
    assert series.spread == 2
    assert Series.from_json(json.loads(json.dumps(series.as_json()))) == series
    assert math.isnan(Series("row", "nobody").value)


def test_an_account_knows_sections_processes_and_requests() -> None:
    mark = escaped(f"{MARK}/write")
    fd = f"13<{FUSE}>"
    lines = [
        '10 getpid() = 10',
        f'10 access("{mark}", F_OK) = -1 ENOENT',
        f'10 sendmsg(4<{escaped("socket:[1]")}>, NULL, 0) = 5',
        f'11 read({fd}, "{head(15)}"..., 1052672) = 64',
        f'12 read({fd},  <unfinished ...>',
        '10 futex(0x1, FUTEX_WAKE, 1) = 1',
        f'12 <... read resumed>"{head(3)}"..., 1052672) = 56',
        f'12 read({fd}, 0x7f, 1052672) = -1 EAGAIN (Resource temporarily unavailable)',
        f'12 read(5<{escaped("/some/file")}>, "{head(15)}"..., 100) = 64',
        f'12 read({fd}, "{head(99)}"..., 1052672) = 64',
        '10 +++ exited with 0 +++',
    ]  # fmt: skip
    found = Account(lines)
    assert found.sections == ["write"]
    assert found.requests == {"READ": 1, "GETATTR": 1, "opcode 99": 1}
    assert found.calls["", 10, "getpid"] == 1
    assert found.calls["write", 10, "sendmsg"] == 1
    assert found.calls["write", 12, "read"] == 4
    assert found.calls.total() == 8


def test_an_account_leaves_out_looks_that_found_nothing() -> None:
    socket, poll = escaped("socket:[1]"), escaped("anon_inode:[eventpoll]")
    event = "{events=EPOLLIN, data={u32=4, u64=4}}"
    lines = [
        f'10 recvfrom(4<{socket}>, 0x7f, 100, MSG_DONTWAIT, NULL, NULL) = -1 EAGAIN (Resource)',
        f'10 recvfrom(4<{socket}>,  <unfinished ...>',
        f'11 epoll_wait(5<{poll}>, [], 3, 0) = 0',
        '10 <... recvfrom resumed>0x7f, 100, MSG_DONTWAIT, NULL, NULL) = -1 EAGAIN (Resource)',
        f'11 epoll_wait(5<{poll}>,  <unfinished ...>',
        '10 sched_yield() = 0',
        '11 <... epoll_wait resumed>[], 3, 0) = 0',
        '10 poll([{fd=4, events=POLLIN}], 1, 0) = 0 (Timeout)',
        '10 clock_nanosleep(CLOCK_MONOTONIC, 0, {tv_sec=0, tv_nsec=2000000}, NULL) = 0',
    ]  # fmt: skip
    assert not Account(lines).calls
    lines = [
        f'10 recvfrom(4<{socket}>,  <unfinished ...>',
        f'11 epoll_wait(5<{poll}>, [{event}], 3, 0) = 1',
        f'11 epoll_wait(5<{poll}>, [], 3, 10) = 0',
        f'11 epoll_wait(5<{poll}>,  <unfinished ...>',
        f'10 access("{escaped(f"{MARK}/later")}", F_OK) = -1 ENOENT',
        '10 <... recvfrom resumed>"x", 100, 0, NULL, NULL) = 1',
        f'11 <... epoll_wait resumed>[{event}], 3, 86400000) = 1',
        f'12 write(6<{escaped("anon_inode:[eventfd]")}>, "{escaped("abcdefgh")}", 8) = 8',
        f'12 epoll_wait(5<{poll}>,  <unfinished ...>',
    ]  # fmt: skip
    assert Account(lines).calls == {
        ("", 10, "recvfrom"): 1,
        ("", 11, "epoll_wait"): 3,
        ("later", 12, EVENTFD): 1,
        ("later", 12, "epoll_wait"): 1,
    }


def test_only_gross_growth_of_a_count_is_a_regression(capsys: pytest.CaptureFixture[str]) -> None:
    baseline = {
        "a: system calls": 2.0,
        "b: messages": 0.0,
        "c: GETXATTR": 1.0,
        "d: system calls": 1,
    }
    same = {"a: system calls": 4.0, "b: messages": 0.5, "d: system calls": 0.0, "e": 100.0}
    assert regressions(same, baseline) == []
    assert compare(same, baseline) == 0
    worse = {**same, "a: system calls": 4.1, "b: messages": 0.6}
    assert [line.split(":")[0] for line in regressions(worse, baseline)] == ["a", "b"]
    assert compare(worse, baseline) == 1
    assert capsys.readouterr().out.count("REGRESSION") == 2
    del worse["d: system calls"]
    assert len(regressions(worse, baseline)) == 3


@pytest.mark.timeout(300)
def test_the_counts_of_this_version_are_those_of_the_baseline(tmp_path: Path) -> None:
    """A run fails for a count that grew grossly, and for no other one."""
    baseline = read_baseline(BASELINE)
    victims = ["API, memory, TCP: create: messages", "mount, file of a tar archive: FUSE requests"]
    for victim in victims:
        baseline[victim] /= 4 * GROSS
    path = tmp_path / "baseline.json"
    path.write_text(json.dumps(baseline))
    words = ["--quick", "--only", "counts"]
    where = ("--baseline", path, "--disk", tmp_path)
    done = bench(*words, *where, patience=4 * PATIENCE)  # strace is slow where others use the cores
    assert done.returncode == 1, done.stderr
    lines = [line for line in done.stdout.splitlines() if line.startswith("REGRESSION")]
    assert [line.split(": ", 1)[1].rpartition(":")[0] for line in lines] == sorted(victims)


def test_a_run_writes_a_report(tmp_path: Path) -> None:
    words = ["--only", "api,startup", "--rows", "read_into 64 B", "--rounds", "1"]
    output = tmp_path / "output"
    words += ["--seconds", "0.01", "--scale", "0.1"]
    done = bench(*words, "--output", output, "--disk", tmp_path)
    assert done.returncode == 0, done.stderr
    results = json.loads((output / "report.json").read_text())
    subjects = {each["subject"] for each in results["api"]["series"]}
    assert {"memory, same process", "file, TCP", "memcpy", "process_vm_readv"} <= subjects
    for each in results["api"]["series"] + results["startup"]["series"]:
        assert len(each["rounds"]) == 1
        assert all(one["value"] > 0 for one in each["rounds"])
    text = (output / "report.md").read_text()
    assert "| read_into 64 B | memory | same process | **" in text
    assert "Engine and Provider ready" in text
    assert list(tmp_path.iterdir()) == [output]  # nothing else is left
    again = bench("--no-measuring", "--output", output, "--disk", tmp_path)
    assert again.returncode == 0, again.stderr
    assert (output / "report.md").read_text() == text


def test_whole_files_are_measured_in_every_place(tmp_path: Path) -> None:
    output = tmp_path / "output"
    words = ["--only", "files", "--rows", "cat 4 KiB", "--rounds", "1", "--seconds", "0.01"]
    done = bench(*words, "--output", output, "--disk", tmp_path)
    assert done.returncode == 0, done.stderr
    series = json.loads((output / "report.json").read_text())["files"]["series"]
    assert len({each["subject"] for each in series}) == 3
    assert all(each["rounds"][0]["value"] > 0 for each in series)
    assert "| cat 4 KiB, 64 files | fsspec over na+sm |" in (output / "report.md").read_text()


def test_a_terminated_run_leaves_no_mount_and_no_file(tmp_path: Path) -> None:
    words = ["--only", "mount", "--rounds", "1", "--scale", "0.01", "--disk", str(tmp_path)]
    with subprocess.Popen(
        [sys.executable, "-m", "benchmarks", *words, "--output", str(tmp_path / "output")],
        cwd=ROOT, env=environment(), stderr=subprocess.PIPE, text=True,
    ) as run:  # fmt: skip
        try:
            assert run.stderr is not None
            line = next(line for line in run.stderr if "streams, round 1 of 1, warabifs" in line)
            assert str(tmp_path) in Path("/proc/mounts").read_text(), line
            run.terminate()
            _, errors = run.communicate(timeout=PATIENCE)
            assert run.returncode == 1, errors
        finally:
            run.kill()
    assert str(tmp_path) not in Path("/proc/mounts").read_text()
    assert list(tmp_path.iterdir()) == []


def results(**sections: Any) -> dict[str, Any]:
    about = {"when": "now", "commit": "abc", "machine": "M", "rounds": 1, "load": "0, 0"}
    return {name: {**about, **told} for name, told in sections.items()}


def test_the_report_says_which_goals_were_met_and_by_how_much_not() -> None:
    figures = {
        ("rewrite", places.TMPFS): 1000.0,
        ("rewrite", places.OURS): 330.0,
        ("cold read", places.OURS): 100.0,
        ("cold read", places.BINDFS): 200.0,
    }
    series = [
        Series(row, place, "MB/s", [Round(value)]).as_json()
        for (row, place), value in figures.items()
    ]
    text = report.text(results(mount={"series": series}))
    assert "**1 of 2 goals met**" in text
    assert "| cold read, warabifs memory: | 100 | ≥ 1.1 × bindfs on tmpfs | 220 | 2.20 × |" in text
    assert "| stat, warabifs memory: | – | ≥ 1.2 × bindfs on tmpfs | – | not measured |" in text


def test_goals_of_the_api_are_multiples_of_peers_in_the_same_run() -> None:
    row = next(row for row in ROWS if row.name == "write 1 MiB")
    series = [
        Series(row.name, "memcpy", rounds=[Round(20)]),
        Series(row.name, "memory, same process", rounds=[Round(26)]),
        Series(row.name, "memory, two processes", rounds=[Round(26.1)]),
        Series(row.name, "file, two processes", rounds=[Round(150)]),
    ]
    found = {each.what: each for each in goals.api(goals.table(series))}
    assert found["write 1 MiB, memory, same process"].met
    assert not found["write 1 MiB, memory, two processes"].met
    assert found["write 1 MiB, file, two processes"].met
    assert not found["write 1 MiB, memory, TCP"].known
    assert not Verdict("x", 1.0, Goal(2, "nobody").value({}), "").known


def test_sizes_are_shown_in_the_largest_unit_that_fits() -> None:
    assert [shown(size) for size in (0, 64, 1025, 4096, 1 << 24)] == [
        "0 B", "64 B", "1025 B", "4 KiB", "16 MiB",
    ]  # fmt: skip


def test_wrong_sections_are_refused() -> None:
    done = bench("--only", "api,fast")
    assert done.returncode == 2
    assert "--only fast: expected some of api, growth" in done.stderr


def test_costs_that_grow_with_numbers_miss_their_goal() -> None:
    costs = [
        {"kind": "names", "operation": operation, "count": count, "cost": cost}
        for operation, low, high in (("look up", 1.0, 2.0), ("list", 1.0, 100.0))
        for count, cost in ((1000, low), (100_000, high))
    ]
    found = {verdict.what: verdict.met for verdict in goals.numbers(costs)}
    assert found == {"look up: 100,000 ÷ 1,000": True, "list: 100,000 ÷ 1,000": False}


@pytest.mark.parametrize("kind", ["names", "entries"])
def test_what_operations_cost_among_many_things(kind: str) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "benchmarks.many", kind, "3", "6"],
        cwd=ROOT, env=environment(), capture_output=True, text=True, timeout=PATIENCE, check=True,
    )  # fmt: skip
    found = json.loads(done.stdout)
    assert {count for _, count, _ in found} == {3, 6}
    assert all(cost > 0 for _, _, cost in found)
