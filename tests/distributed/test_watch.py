"""Stalled and lost processes are reported correctly, with a store in memory.

tests/test_multihost.py tests processes that really die.
"""

import json
import time

import pytest

from imagen_jax.distributed import device_faults, startup, watch
from imagen_jax.distributed.watch import Heartbeat, Watch, stalled_processes
from imagen_jax.exit_codes import DeviceFailed, HardwareFault

HOSTS = ["a", "b", "c"]
LOST_S = 1.0


def heartbeats(**changes):
    """Three processes in the same activity, with heartbeats 1 s old; changes by process:
    p1=dict(step=3).
    """
    processes = {
        i: Heartbeat(step=5, activity="training", activity_index=11, index=7, received_at=99.0)
        for i in range(3)
    }
    for name, change in changes.items():
        for field, value in change.items():
            setattr(processes[int(name[1:])], field, value)
    return processes


@pytest.mark.parametrize(
    "heartbeats, behind, words",
    [
        (heartbeats(), [], "no single process: all 3 are alive and at step 5, training"),
        (
            heartbeats(p1=dict(received_at=60.0)),
            [1],
            "process 1 (b), no heartbeat for 40 s, last at step 5, training",
        ),
        (heartbeats(p1=dict(received_at=60.0, activity="finished")), [], "no single process: "),
        (
            heartbeats(p2=dict(step=4, activity="reading a batch", activity_index=9)),
            [2],
            "process 2 (c), at step 4, reading a batch",
        ),
        (
            heartbeats(p2=dict(activity="reading a batch", activity_index=10)),
            [2],
            "process 2 (c), at step 5, reading a batch",
        ),
        (
            heartbeats(p0=dict(activity_index=12), p1=dict(activity_index=12)),
            [2],
            "process 2 (c), at step 5, training",
        ),
        (
            heartbeats(p1=dict(received_at=60.0), p2=dict(activity_index=9)),
            [1],
            "process 1 (b), no heartbeat",
        ),
        (
            heartbeats(
                p0=dict(received_at=60.0), p1=dict(received_at=60.0), p2=dict(received_at=60.0)
            ),
            [0, 1, 2],
            "process 0 (a), no heartbeat for 40 s, last at step 5, training; process 1 (b)",
        ),
    ],
)
def test_stalled_processes(heartbeats, behind, words):
    """Catches: the fastest blamed for the slowest, a process that finished taken for dead."""
    indices, description = stalled_processes(heartbeats, HOSTS, now=100.0, silent_s=30.0)
    assert indices == behind
    assert description.startswith(words)


class Store(dict):
    """What is used of jax's client."""

    def key_value_set(self, key, value, allow_overwrite=False):
        self[key] = value

    def key_value_dir_get(self, directory):
        return [(key, value) for key, value in list(self.items()) if key.startswith(directory)]

    def blocking_key_value_get(self, key, timeout_ms):
        if key not in self:
            time.sleep(LOST_S / 100)
            raise RuntimeError("DEADLINE_EXCEEDED")
        return self[key]

    def beat(self, index, beat, **changes):
        self[f"{watch.HEARTBEATS}{index}"] = json.dumps(
            {"step": 0, "activity": "training", "activity_index": 1, "index": beat} | changes
        )


@pytest.fixture
def processes(monkeypatch):
    """Makes this process one of three, and returns (watch, store, exit codes)."""
    monkeypatch.setattr(watch, "_delay_abort", lambda: None)
    monkeypatch.setattr(watch, "_connection_error", lambda host, port: None)
    monkeypatch.setattr(startup, "hosts", lambda: HOSTS)

    def make(index=0):
        monkeypatch.setattr(startup, "member", lambda: startup.Member("a:1", 3, index, "test"))
        store, codes = Store(), []
        return Watch(LOST_S, store, codes.append), store, codes

    return make


def until(condition, seconds=10.0):
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.01)


class Clock:
    """Time that passes only when it is told to."""

    def __init__(self):
        self.now = 1000.0

    def monotonic(self) -> float:
        return self.now

    def sleep(self, seconds: float) -> None:
        self.now += seconds


def test_waiting_is_explained(processes, caplog, monkeypatch):
    """Catches: a warning while all goes well, none while nothing does, and one that blames a
    process for its own waiting.
    """
    monkeypatch.setattr(watch, "time", clock := Clock())
    watching, store, codes = processes(1)

    def go(beats, at, **others):
        for beat in beats:
            at(beat)
            for name, said in others.items():
                store.beat(int(name[1:]), beat, **said)
            clock.sleep(LOST_S / 60)
            watching._publish_heartbeat()
            watching._check_others()

    stay = lambda beat: None
    go(
        range(60),
        lambda beat: watching.at(beat, "training"),
        p0=dict(step=60, activity_index=120),
        p2=dict(step=60, activity_index=120),
    )
    assert not caplog.records
    go(range(100, 150), stay, p2=dict(step=60, activity_index=122))
    assert (
        "step 59, training for" in caplog.messages[0]
        and "waiting for process 0 (a), no heartbeat for" in caplog.messages[0]
    )
    caplog.clear()
    watching.at(59, "reading a batch")
    go(
        range(200, 260),
        stay,
        p0=dict(step=61, activity_index=130),
        p2=dict(step=61, activity_index=130),
    )
    assert "step 59, reading a batch for" in caplog.messages[0] and caplog.messages[0].endswith(
        "the others wait for this process"
    )
    assert codes == []


def test_another_process_that_failed_ends_this_one(processes, capfd):
    """Catches: waiting in a collective operation for a process that has ended, and an exit code
    that blames this one.
    """
    watching, store, codes = processes(2)
    with watching:
        time.sleep(LOST_S / 5)
        assert codes == []
        store[f"{watch.FAILURES}1"] = "process 1 (b) failed: no space left"
        until(lambda: codes)
    assert codes[0] == watch.LOST
    assert "error: process 1 (b) failed: no space left\n" in capfd.readouterr().err


@pytest.mark.parametrize(
    "error, code, trace",
    [
        (ValueError("wrong\nfield"), 2, False),
        (KeyError("x"), 1, True),
        (OSError(116, "Stale file handle"), 1, False),
        (FloatingPointError("the loss is not finite"), 3, False),
        (HardwareFault("the copies differ"), 4, False),
    ],
)
def test_own_failure_is_published(processes, capfd, error, code, trace):
    """Catches: an error that the others never hear of, a foreseen one with a traceback, another
    without; a file system that was away, a loss that is not finite or a faulty device taken for
    invalid input, which no launcher repeats.
    """
    watching, store, codes = processes(1)
    with pytest.raises(type(error)), watching:
        raise error
    assert codes == [code]
    text = " ".join(str(error).split())
    assert store[f"{watch.FAILURES}1"] == f"process 1 (b) failed: {text}"
    err = capfd.readouterr().err
    assert err.endswith(f"error: {text}\n") and ("Traceback" in err) == trace


def test_failed_operation_is_blamed_on_the_process_that_went(processes, capfd):
    """Catches: a long traceback of a collective operation where another process has died; and a
    process blamed that is there.
    """
    import jax

    watching, store, codes = processes(1)
    with pytest.raises(jax.errors.JaxRuntimeError), watching:
        store.beat(0, 1), store.beat(2, 1)
        raise jax.errors.JaxRuntimeError("Gloo all-reduce failed: Connection closed by peer")
    assert codes[0] == watch.LOST
    err = capfd.readouterr().err
    assert "Traceback" not in err and "error: lost process 0 (a), no heartbeat for" in err
    assert " (noticed when an operation with other processes failed here); " in err
    assert store[f"{watch.FAILURES}1"].startswith(
        "lost process 0 (a), no heartbeat for"
    )  # so that nobody takes the next to leave for the one that was lost

    watching, store, codes = processes(1)
    with pytest.raises(jax.errors.JaxRuntimeError), watching:
        watching._store = Talking()
        raise jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: out of memory")
    assert codes == [2] and "RESOURCE_EXHAUSTED" in capfd.readouterr().err


@pytest.mark.parametrize("text, blamed", [("DATA_LOSS: x", [1]), ("INTERNAL: Gloo failed", [0])])
def test_a_failed_device_is_blamed_on_its_host(processes, capfd, text, blamed):
    """Catches: a failed device blamed on a process that waits, or a process that is gone blamed on
    the device of one that notices.
    """
    import jax

    watching, store, codes = processes(1)
    recorded = []
    watching.failures = Recorded(recorded)
    with pytest.raises(DeviceFailed), watching:
        store.beat(0, 1), store.beat(2, 1)  # process 0 is silent from now on
        until(lambda: store.beat(2, time.monotonic_ns()) or watching._heartbeats)
        with device_faults.named(lambda: 7):
            raise jax.errors.JaxRuntimeError(text)
    assert codes == [4 if blamed == [1] else watch.LOST]
    assert [process for process, _ in recorded] == blamed
    assert "Traceback" not in capfd.readouterr().err


class Recorded:
    """Takes what `HostFailures` writes."""

    def __init__(self, found):
        self.found = found

    def record(self, process, host, code, reason):
        self.found.append((process, code))


@pytest.mark.parametrize(
    "error, seconds", [(ConnectionRefusedError(), 0), (TimeoutError(), LOST_S)]
)
def test_process_0_that_disappears_is_named(processes, capfd, monkeypatch, error, seconds):
    """Catches: an end by jax's abort, whose message names nobody and whose code is a crash; and a
    run that one slow connection ends.
    """
    watching, store, codes = processes(1)
    with watching:
        time.sleep(LOST_S / 5)
        assert codes == []
        monkeypatch.setattr(watch, "_connection_error", lambda host, port: error)
        started, beat = time.monotonic(), 0
        while not codes:
            beat += 1
            store.beat(0, beat), store.beat(2, beat)
            time.sleep(LOST_S / 100)
            assert time.monotonic() - started < 5 * LOST_S
    assert time.monotonic() - started > 0.7 * seconds
    assert codes[0] == watch.LOST
    assert "error: lost process 0 (a), the coordinator" in capfd.readouterr().err


def test_a_process_without_heartbeat_is_lost(processes, capfd):
    """Catches: a process that waits in a collective operation until jax aborts it."""
    watching, store, codes = processes(1)
    with watching:
        started, beat = time.monotonic(), 0
        while not codes:
            beat += 1
            store.beat(2, beat)  # process 0 says nothing
            time.sleep(LOST_S / 100)
            assert time.monotonic() - started < 5 * LOST_S
    assert time.monotonic() - started > LOST_S / 2
    assert codes[0] == watch.LOST
    err = capfd.readouterr().err
    assert "error: lost process 0 (a), no heartbeat for" in err and "noticed" not in err


class Talking(Store):
    """Where all processes are heard of whenever one looks."""

    def key_value_dir_get(self, directory):
        if directory == watch.HEARTBEATS:
            for i in (0, 2):
                self.beat(i, time.monotonic_ns())
        return super().key_value_dir_get(directory)


def test_alone_nothing_is_watched(monkeypatch):
    """Catches: a thread, a store, or an exit in a run of one process."""
    import threading

    threads = threading.active_count()
    with pytest.raises(ValueError), Watch(LOST_S) as watching:
        watching.at(1, "training")
        assert threading.active_count() == threads
        raise ValueError
