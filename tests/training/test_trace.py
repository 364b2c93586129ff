"""The option --profile and the trace it writes; tests/test_commands.py writes a real one."""

import logging
import os
import signal
import time

import pytest

from imagen_jax.train import read_profile
from imagen_jax.training.trace import REQUEST, Requests, Trace


def test_a_trace_that_was_asked_for_and_not_written_is_reported(tmp_path, caplog):
    """Catches --profile of steps that this process did not do, without a file and without a line;
    and a warning in a run without --profile.
    """
    with caplog.at_level(logging.WARNING), Trace(tmp_path, 20, 5) as trace:
        for done in range(30, 33):
            trace.before(done)
            trace.after(done + 1, lambda: None)
    assert "no trace: none of steps 20 to 25 was done" in caplog.text
    caplog.clear()
    with caplog.at_level(logging.WARNING), Trace(tmp_path, 0, 0):
        pass
    assert not caplog.records


@pytest.mark.parametrize("text", ["8:1", "20:5", "2:0"])
def test_a_profile_of_no_step_is_refused(text):
    """Catches a profile of steps behind the end of the run, which is accepted and never written."""
    with pytest.raises(ValueError, match="traces none of the 8 steps"):
        read_profile(text, 8)
    assert read_profile("7:5", 8) == (7, 5) and read_profile("", 8) == (0, 0)


@pytest.mark.parametrize("text", ["20", "a:b", "-1:5", "3:", "²:1"])
def test_a_profile_that_is_no_pair_is_refused(text):
    """Catches a traceback for a number that Python calls a digit and cannot read."""
    with pytest.raises(ValueError, match="is not FIRST:COUNT"):
        read_profile(text, 8)


@pytest.fixture
def traces(monkeypatch):
    """The directories of started traces; a stopped one is followed by None."""
    made = []
    monkeypatch.setattr("jax.profiler.start_trace", made.append)
    monkeypatch.setattr("jax.profiler.stop_trace", lambda: made.append(None))
    return made


def go_on(trace, steps):
    settled = []
    for done in steps:
        trace.before(done)
        trace.after(done + 1, lambda done=done: settled.append(done + 1))
    return settled


def until(condition):
    end = time.monotonic() + 20
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.005)


@pytest.mark.parametrize(
    "text, count", [("", 5), (" 2\n", 2), ("many", 5), ("0", 5), ("\udcff", 5)]
)
def test_a_file_asks_for_a_trace(tmp_path, traces, text, count, caplog):
    """Catches a trace of all later steps, one that is repeated, a file that stays, and a number
    that is not read.
    """
    caplog.set_level(logging.INFO)
    with Requests(tmp_path, poll_s=0.005) as requests:
        with Trace(tmp_path / "profile", 3, 1, requests) as trace:
            assert go_on(trace, range(3)) == []
            (tmp_path / REQUEST).write_text(text, errors="surrogateescape")
            until(lambda: requests._count)
            assert not (tmp_path / REQUEST).exists()
            assert go_on(trace, range(3, 20)) == [4, 4 + count]
    planned, asked = str(tmp_path / "profile"), str(tmp_path / "profile" / "4")
    assert traces == [planned, None, asked, None]
    assert caplog.text.count("trace of steps from 4 in") == 1
    assert ("not a number of steps" in caplog.text) == (text not in ("", " 2\n"))
    assert "no trace" not in caplog.text


def test_a_signal_asks_for_a_trace(tmp_path, traces):
    """Catches a signal that ends the run, and a handler that stays after it."""
    before = signal.getsignal(signal.SIGUSR1)
    with Requests(tmp_path) as requests, Trace(tmp_path, 0, 0, requests) as trace:
        os.kill(os.getpid(), signal.SIGUSR1)
        until(lambda: requests._count)
        assert go_on(trace, range(7, 10)) == []
    assert traces == [str(tmp_path / "7"), None]  # the run ended before all steps
    assert signal.getsignal(signal.SIGUSR1) == before


def test_a_planned_trace_comes_after_one_that_was_asked_for(tmp_path, traces, caplog):
    """Catches --profile that is forgotten after a request."""
    with Requests(tmp_path) as requests, Trace(tmp_path, 9, 2, requests) as trace:
        os.kill(os.getpid(), signal.SIGUSR1)
        until(lambda: requests._count)
        assert go_on(trace, range(1, 20)) == [6, 11]
    assert traces == [str(tmp_path / "1"), None, str(tmp_path), None]
    assert not [record for record in caplog.records if record.levelno >= logging.WARNING]


def test_only_the_first_process_takes_requests(tmp_path, traces):
    """Catches a file that another process removes, and one that the signal ends."""
    (tmp_path / REQUEST).touch()
    with Requests(tmp_path, enabled=False, poll_s=0.001) as requests:
        os.kill(os.getpid(), signal.SIGUSR1)
        time.sleep(0.02)
        assert requests.take() == 0
    assert (tmp_path / REQUEST).exists()


def test_a_trace_that_cannot_be_written_does_not_end_the_run(tmp_path, traces, monkeypatch, caplog):
    """Catches a run that a full disk ends because somebody wanted a trace."""

    def full():
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("jax.profiler.stop_trace", full)
    with Trace(tmp_path, 1, 1) as trace:
        assert go_on(trace, range(3)) == [2]
    assert "trace of steps from 1 was not written: [Errno 28]" in caplog.text


def test_a_trace_after_one_that_was_not_written_does_not_end_the_run(
    tmp_path, traces, monkeypatch, caplog
):
    """Catches a run that ends because jax keeps a trace open that it could not write."""

    def start(directory):
        if traces:
            raise RuntimeError("Profile has already been started.")
        traces.append(directory)

    def full():
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("jax.profiler.start_trace", start)
    monkeypatch.setattr("jax.profiler.stop_trace", full)
    with Requests(tmp_path) as requests:
        with Trace(tmp_path / "profile", 0, 2, requests) as trace:
            assert go_on(trace, range(3)) == [2]
            requests._ask(2)
            assert go_on(trace, range(3, 9)) == []
    assert "trace of steps from 0 was not written" in caplog.text
    assert caplog.text.count("trace of steps from 3 was not started: Profile has already") == 1


def test_a_planned_trace_that_cannot_start_is_tried_once(tmp_path, monkeypatch, caplog):
    """Catches an error for each of its steps."""

    def busy(_):
        raise RuntimeError("busy")

    monkeypatch.setattr("jax.profiler.start_trace", busy)
    with Trace(tmp_path, 1, 3) as trace:
        assert go_on(trace, range(5)) == []
    assert caplog.text.count("trace of steps from 1 was not started: busy") == 1
