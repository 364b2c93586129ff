"""Where the time of a run goes: the entries of a process, and their sum over restarts."""

import contextlib
import json
import math
import os
import subprocess
import sys
import time

import pytest

from imagen_jax import goodput
from imagen_jax.goodput import Ledger, parse_entry, process_age, read_entries, summarise
from imagen_jax.line_logs import LineLog, read_lines


class Clock:
    time = 1000.0

    def __call__(self):
        return self.time


@pytest.fixture
def now(monkeypatch):
    """A clock to set."""
    clock = Clock()
    monkeypatch.setattr("time.monotonic", clock)
    monkeypatch.setattr("time.time", lambda: clock.time + 1e9)
    return clock


def ledger(workdir):
    """A ledger without its thread, of a command that began 7 s ago."""
    one = Ledger(workdir, began=time.monotonic() - 7)
    one._thread.start, one._thread.join = (lambda: None), (lambda: None)
    return one


def entry(process, began, end, steps=(0, 0), ended=False, **seconds):
    return {
        "process": process,
        "start": float(began),
        "end": float(end),
        "seconds": seconds,
        "from_step": steps[0],
        "to_step": steps[1],
    } | ({"ended": True} if ended else {})


def test_the_entries_of_a_process(tmp_path, now):
    """Catches a phase that counts for its neighbour, the time before the ledger left out, a wait
    for data that breaks the entries of the loop, and an entry that does not end.
    """
    with ledger(tmp_path) as one:
        now.time += 1
        one.at(0, "restore")
        now.time += 2
        one.at(40, "compile")
        now.time += 30
        one.at(40, "step")
        for step in (40, 41):
            with one.phase(step, "data"):
                now.time += 1
            now.time += 4
        with one.phase(42, "checkpoint"):
            now.time += 3
        now.time += 4
    found = read_entries(tmp_path)
    assert [e["seconds"] for e in found] == [
        {"start": 8.0},
        {"restore": 2.0},
        {"compile": 30.0},
        {"step": 8.0, "data": 2.0},
        {"checkpoint": 3.0},
        {"step": 4.0},
    ]
    assert [(e["from_step"], e["to_step"]) for e in found[-3:]] == [(40, 42), (42, 42), (42, 42)]
    assert {e["process"] for e in found} == {0}
    assert all(a["end"] == b["start"] for a, b in zip(found, found[1:]))
    assert found[0]["end"] - found[0]["start"] == pytest.approx(8.0, abs=1e-3)
    assert [e.get("ended", False) for e in found] == [False] * 5 + [True]


def test_the_loop_has_an_entry_per_minute(tmp_path, now):
    """Catches a file that grows by an entry per second or per step."""
    with ledger(tmp_path) as one:
        one.at(0, "step")
        for step in range(1, 1001):
            now.time += 1
            one.flush()
            one.at(step, "step")
    found = read_entries(tmp_path)
    assert len(found) == 1 + -(-1000 // 61) and found[-1]["to_step"] == 1000
    assert sum(e["seconds"]["step"] for e in found[1:]) == 1000
    assert all(a["to_step"] == b["from_step"] for a, b in zip(found, found[1:]))


def test_a_killed_process_leaves_what_it_has_written(tmp_path, now):
    """Catches an entry that appears only when its phase ends, and a second process that replaces
    the last entry of the first.
    """
    one = ledger(tmp_path)
    now.time += 100
    one.at(0, "compile")
    now.time += 20
    one.flush()
    now.time += 1000  # killed meanwhile
    with ledger(tmp_path) as other:
        other.at(0, "compile")
    found = read_entries(tmp_path)
    assert [e["process"] for e in found] == [0, 0, 1, 1]
    assert found[1]["seconds"] == {"compile": 20.0} and not found[1].get("ended")
    summary = summarise(found)
    assert summary.seconds["down"] == pytest.approx(1000 - 7, abs=1e-3)
    assert summary.wall_s == pytest.approx(7 + 100 + 20 + 1000, abs=1e-3) and summary.ended


def test_an_error_is_not_an_end(tmp_path, now):
    """Catches a failed process shown as one that has ended by itself."""
    with contextlib.suppress(OSError), ledger(tmp_path) as one:
        one.at(0, "compile")
        raise OSError
    assert not summarise(read_entries(tmp_path)).ended


def test_lost_work():
    """Catches steps that count twice after a kill, work lost twice, a share of the wrong end of an
    entry, and an unfinished step that counts as done.
    """
    entries = [
        entry(0, 0, 10, start=10.0),
        entry(0, 10, 110, (0, 100), step=90.0, data=10.0),
        entry(0, 110, 115, (100, 100), checkpoint=5.0),
        entry(0, 115, 155, (100, 140), step=40.0),
        entry(0, 155, 160, (140, 140), step=5.0),
        entry(1, 170, 180, start=10.0),  # is killed before it makes a step
        entry(2, 200, 210, start=10.0),
        entry(2, 210, 230, (110, 130), step=20.0),
        entry(3, 230, 240, (130, 130), compile=10.0),
        entry(3, 240, 250, (130, 140), step=10.0, ended=True),
    ]
    summary = summarise(entries)
    assert summary.seconds == {
        "start": 30.0,
        "compile": 10.0,
        "data": 10.0,
        "step": 90.0 + 10.0 + 20.0 + 10.0,
        "checkpoint": 5.0,
        "lost": 30.0 + 5.0,
        "down": 10.0 + 20.0,
    }
    assert summary.wall_s == 250 and summary.goodput == 130 / 250
    assert summary.losses()[:2] in ([("lost", 35 / 250), (n, 30 / 250)] for n in ("start", "down"))
    again = [*entries, entry(4, 250, 260, (0, 10), step=10.0)]
    assert summarise(again).seconds["step"] == 10.0
    assert summarise(again).seconds["lost"] == 165.0


def test_the_pace_of_the_last_process():
    """Catches a pace without saves and validations, one with the compilation, one of earlier
    processes, and one of a process that has not finished a step.
    """
    run = [
        entry(0, 0, 10, (0, 100), step=10.0),
        entry(1, 20, 30, compile=10.0),
        entry(1, 30, 40, (100, 110), step=8.0, data=2.0),
        entry(1, 40, 70, (110, 110), checkpoint=30.0),
        entry(1, 70, 80, (110, 120), step=10.0),
    ]
    later = entry(2, 100, 108, start=8.0, ended=True)
    assert goodput.step_seconds(run) == goodput.step_seconds([*run, later]) == 50 / 20
    for entries in ([], [*run, entry(2, 100, 110, (120, 120), step=10.0)]):
        assert math.isnan(goodput.step_seconds(entries))


def test_a_command_that_finds_nothing_to_do_is_no_process():
    """Catches a finished run that loses goodput when its command is given again a week later."""
    run = [entry(0, 0, 10, (0, 10), step=10.0, ended=True)]
    later = entry(1, 600_000, 600_008, start=6.0, restore=2.0)
    assert summarise([*run, later | {"ended": True}]) == summarise(run)
    assert summarise([*run, later]).seconds["down"] == 600_000 - 10


def test_without_entries():
    """Catches a division by zero for a run of an earlier version."""
    summary = summarise([])
    assert summary.wall_s == 0 and summary.goodput != summary.goodput and not summary.losses()


@pytest.mark.parametrize(
    "change",
    [
        {"process": -1},
        {"start": "now"},
        {"seconds": [1]},
        {"seconds": {"step": -1.0}},
        {"seconds": {"step": None}},
        {"end": float("inf")},
        {"to_step": 1.5},
    ],
)
def test_damaged_entries_are_passed_over(change):
    """Catches a table of all runs that one damaged line takes down."""
    assert parse_entry(json.dumps(entry(0, 0, 1, step=1.0)).encode())
    assert parse_entry(json.dumps(entry(0, 0, 1, step=1.0) | change).encode()) is None


def test_a_torn_line_is_removed(tmp_path, now):
    """Catches the first entry of a process that continues the torn line of another."""
    (tmp_path / goodput.GOODPUT).write_bytes(b'{"process": 0, "sta')
    with ledger(tmp_path):
        pass
    assert len(read_lines(tmp_path / goodput.GOODPUT)) == len(read_entries(tmp_path)) == 1


def test_a_full_disk_does_not_end_the_run(tmp_path, now, monkeypatch, caplog):
    """Catches an error in the loop, a warning per second, and an entry that is lost or doubled."""
    one = ledger(tmp_path)
    one.at(0, "restore")
    append = LineLog.append

    def full(self, line):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(LineLog, "append", full)
    assert not one._try_flush() and not one._try_flush(quiet=True)
    assert caplog.text.count("No space left") == 1
    now.time += 5
    monkeypatch.setattr(LineLog, "append", append)
    one.__exit__(None)
    assert [e["seconds"] for e in read_entries(tmp_path)] == [{"start": 7.0}, {"restore": 5.0}]


def test_the_age_of_a_process():
    """Catches an age since the import, which leaves out the start of Python and of JAX."""
    code = (
        "import time; time.sleep(0.4); from imagen_jax.goodput import process_age;"
        "print(process_age())"
    )
    began = time.monotonic()
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert 0.4 < float(done.stdout) < time.monotonic() - began + 0.02
    assert process_age() > 0


def test_the_thread_writes_while_a_phase_lasts(tmp_path):
    """Catches a compilation of minutes of which a kill leaves nothing."""
    with Ledger(tmp_path, write_s=0.01) as one:
        one.at(0, "compile")
        end = time.monotonic() + 10
        while time.monotonic() < end and len(read_entries(tmp_path)) < 2:
            time.sleep(0.005)
        first = read_entries(tmp_path)[-1]
        while time.monotonic() < end and read_entries(tmp_path)[-1]["end"] == first["end"]:
            time.sleep(0.005)
        assert read_entries(tmp_path)[-1]["seconds"]["compile"] > first["seconds"]["compile"]
    assert len(read_entries(tmp_path)) == 2


def test_other_processes_write_nothing(tmp_path):
    """Catches two processes that write one file."""
    with Ledger(tmp_path / "run", enabled=False) as one:
        with one.phase(0, "data"):
            one.at(0, "step")
        one.flush()
    assert not os.listdir(tmp_path)


def test_a_line_is_replaced(tmp_path):
    """Catches a rest of a longer line, and a next line at the wrong place."""
    one = LineLog(tmp_path / "log")
    one.append("first")
    for text in ("a longer line", "short", "the longest line of all"):
        one.append("x") if text == "a longer line" else None
        one.replace(text)
        assert [line.split() for line in read_lines(tmp_path / "log")] == [
            [b"first"],
            text.encode().split(),
        ]
    one.append("last")
    one.close()
    assert [line.rstrip() for line in read_lines(tmp_path / "log")] == [
        b"first",
        b"the longest line of all",
        b"last",
    ]
