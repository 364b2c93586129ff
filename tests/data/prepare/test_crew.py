"""Several processes prepare one directory: the bytes of one process, through any kill."""

import fcntl
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from contextlib import ExitStack
from pathlib import Path

import pytest

from imagen_jax.data.prepare import crew, passes
from imagen_jax.data.prepare.crew import Crew
from imagen_jax.data.sources.folder import FolderSource
from imagen_jax.distributed.watch import LOST
from imagen_jax.exit_codes import ProcessLost
from tests.data.synthetic_source import SETTINGS, FakeEncoder, tree

ROOT = Path(__file__).resolve().parents[3]
CAPTIONS = {"a colour ramp"} | {f"picture number {i}" for i in range(20)}


def start(folder, output, count, run, victim=None, kill_at=0):
    """Starts `count` processes; `victim` kills itself at a rename.

    Each logs the captions that it encodes to RUN.INDEX next to `output`.
    """
    base = [sys.executable, "-m", "tests.data.synthetic_source", str(folder), str(output), "1"]
    pipes = {"stdout": subprocess.DEVNULL, "stderr": subprocess.PIPE, "text": True, "cwd": ROOT}
    address, started = f"127.0.0.1:{free_port()}", []
    for index in range(count):
        joined = {
            "JAX_COORDINATOR_ADDRESS": address,
            "JAX_NUM_PROCESSES": str(count),
            "JAX_PROCESS_ID": str(index),
        }
        spec = run if run == "environment" else f"{index}:{count}:{run}"
        command = [
            *base,
            str(kill_at if index == victim else 0),
            spec,
            str(output.parent / f"{run}.{index}"),
        ]
        started.append(subprocess.Popen(command, env=os.environ | joined, **pipes))
    return started


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as server:
        return server.getsockname()[1]


def finish(processes) -> list[str]:
    """Waits until all have succeeded; returns their standard errors."""
    errors = [process.communicate(timeout=120)[1] for process in processes]
    assert [process.returncode for process in processes] == [0] * len(processes), errors
    return errors


def encoded(output, run) -> list[str]:
    return [line for log in output.parent.glob(f"{run}.*") for line in log.read_text().splitlines()]


def test_two_processes_make_what_one_makes(folder, whole, tmp_path):
    """Catches two joined processes that encode a caption twice or never, or change a byte."""
    output = tmp_path / "data"
    finish(start(folder, output, 2, "environment"))
    assert tree(output) == tree(whole)
    texts = encoded(output, "environment")
    assert len(texts) == len(CAPTIONS) and set(texts) == CAPTIONS
    assert (
        all((tmp_path / f"environment.{index}").stat().st_size for index in (0, 1))
        and not (tmp_path / "data.partial").exists()
    )


# The rename at which each dies: process 1 with a caption shard written and not in the journal,
# process 0 just after it has written its second.
@pytest.mark.parametrize(
    ("run", "victim", "kill_at", "restarted"),
    [("first", 1, 4, 1), pytest.param("environment", 0, 15, 3, marks=pytest.mark.slow)],
)
def test_killed_in_the_middle_others_say_so_and_a_restart_continues(
    folder, whole, tmp_path, run, victim, kill_at, restarted
):
    """Catches a survivor that hangs, or whose exit code makes a launcher blame it.

    Also a half-written file under a final name, and finished shards encoded again or lost when the
    number of processes changes.
    """
    output, partial = tmp_path / "data", tmp_path / "data.partial"
    processes = start(folder, output, 2, run, victim, kill_at)
    errors = [process.communicate(timeout=120)[1] for process in processes]
    assert processes[victim].returncode == -signal.SIGKILL, errors[victim]
    assert processes[1 - victim].returncode == LOST, errors[1 - victim]
    name = socket.gethostname() if run == "environment" else f"host-{victim}"
    last = errors[1 - victim].splitlines()[-1]
    assert (
        last.startswith(f"error: process {victim} ({name}) sent no heartbeat for 6 s: it died")
        and "Traceback" not in errors[1 - victim]
    )
    assert not output.exists()
    written, complete = tree(partial / "result"), tree(whole)
    assert written and all(
        complete[name] == digest
        for name, digest in written.items()
        if not Path(name).name.startswith(".")
    )
    journalled = sum(
        json.loads(path.read_text())["rows"] for path in (partial / "journal").glob("captions-*")
    )
    assert 0 < journalled < len(CAPTIONS)
    finish(start(folder, output, restarted, "second"))
    assert tree(output) == complete and not partial.exists()
    first, second = encoded(output, run), encoded(output, "second")
    assert set(first) | set(second) == CAPTIONS and len(first) == len(set(first))
    assert len(second) == len(set(second)) == len(CAPTIONS) - journalled


@pytest.fixture
def quick(monkeypatch):
    monkeypatch.setattr(crew, "BEAT_S", 0.03)
    monkeypatch.setattr(crew, "SILENT_S", 1.5)


def together(*members):
    """Runs functions in threads; returns the exception that ended each, or None."""
    ends = [None] * len(members)

    def run(i):
        try:
            members[i]()
        except (ValueError, ProcessLost) as error:
            ends[i] = error

    threads = [threading.Thread(target=run, args=(i,)) for i in range(len(members))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(20)
        assert not thread.is_alive()
    return ends


def preparing(folder, output, index, count, encoder=None, run="one", late_s=0.0, **changes):
    """Returns a function that is process `index` of `count`, started `late_s` later."""
    partial = output.with_name(f"{output.name}.partial")

    def prepare():
        time.sleep(late_s)
        with Crew(
            partial / "crew", index, count, run, [f"host-{i}" for i in range(count)]
        ) as member:
            source, settings = FolderSource(folder, 0.2), passes.Settings(**SETTINGS | changes)
            passes.prepare(source, encoder or FakeEncoder(), output, settings, member)

    return prepare


@pytest.mark.parametrize("count", [2, 5])
def test_any_number_ends_together_and_again_at_once(folder, whole, tmp_path, quick, count):
    """Catches idle processes that hang or end before the result is there, and work done twice."""
    output = tmp_path / "data"
    for run in ("one", "two"):
        encoders = [FakeEncoder() for _ in range(count)]
        members = [
            preparing(folder, output, index, count, encoders[index], run) for index in range(count)
        ]
        assert together(*members) == [None] * count
        assert tree(output) == tree(whole) and not (tmp_path / "data.partial").exists()
    assert not any(encoder.encoded for encoder in encoders)


def test_a_process_at_work_holds_the_lock(folder, tmp_path, quick):
    """Catches a restart that cannot tell that a process of an earlier start still writes."""
    seen = []

    class Looks(FakeEncoder):
        def encode(self, texts, batch_size):
            with open(tmp_path / "data.partial" / "crew" / "lock", "w") as file:
                try:
                    fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                except BlockingIOError:
                    seen.append(texts)
            return super().encode(texts, batch_size)

    assert together(
        preparing(folder, tmp_path / "data", 0, 2),
        preparing(folder, tmp_path / "data", 1, 2, Looks()),
    ) == [None, None]
    assert seen


def test_a_mistake_of_one_ends_all_with_its_words(folder, tmp_path, quick):
    """Catches others that end without the reason, or only after the silence."""

    class Broken(FakeEncoder):
        def encode(self, texts, batch_size):
            raise ValueError("no features today")

    members = [
        preparing(folder, tmp_path / "data", i, 3, Broken() if i == 1 else None) for i in range(3)
    ]
    ends = together(*members)
    assert str(ends[1]) == "no features today"
    assert [isinstance(end, ProcessLost) for end in ends] == [True, False, True]
    assert str(ends[0]) == str(
        ends[2]
    ) and "process 1 (host-1) stopped: no features today; start all processes again" in str(ends[0])


def test_other_settings_in_one_process_are_refused(folder, tmp_path, quick):
    """Catches shards of two sizes in one directory, from processes with other options."""
    ends = together(
        preparing(folder, tmp_path / "data", 0, 2),
        preparing(folder, tmp_path / "data", 1, 2, shard_size=9),
    )
    assert "shard_size was 8, is 9" in str(ends[1]) and "process 1 (host-1) stopped" in str(ends[0])


def test_a_directory_that_is_not_shared_is_noticed(folder, tmp_path, quick):
    """Catches hosts with separate directories that wait for each other for ever."""
    (tmp_path / "elsewhere").mkdir()
    ends = together(
        preparing(folder, tmp_path / "data", 0, 2),
        preparing(folder, tmp_path / "elsewhere" / "data", 1, 2),
    )
    assert "process 1 (host-1) sent no heartbeat for 1.5 s: it died, or cannot access" in str(
        ends[0]
    )
    assert "process 0 (host-0) sent no heartbeat" in str(ends[1])


@pytest.mark.parametrize("count", [1, pytest.param(2, marks=pytest.mark.slow)])
def test_processes_of_an_earlier_start_are_waited_for(
    folder, whole, tmp_path, quick, monkeypatch, count
):
    """Catches a new start next to writing processes of an old one, or that mixes up heartbeats."""
    monkeypatch.setattr(
        crew, "SILENT_S", 4.0
    )  # two processes write the same file in turn, and each has to be heard
    with Crew(tmp_path / "data.partial" / "crew", 1, 2, "old") as old:
        with old.at_work():
            ends = together(
                *[preparing(folder, tmp_path / "data", index, count) for index in range(count)]
            )
            assert all("processes of an earlier start still work in" in str(end) for end in ends)
        ends_soon = ExitStack()
        ends_soon.enter_context(old.at_work())
        threading.Timer(0.3, ends_soon.close).start()
        start = time.monotonic()
        assert (
            together(
                *[preparing(folder, tmp_path / "data", index, count) for index in range(count)]
            )
            == [None] * count
        )
        assert time.monotonic() - start > 0.3
    assert tree(tmp_path / "data") == tree(whole)


def test_what_an_earlier_start_said_is_old(folder, whole, tmp_path, quick):
    """Catches a process that begins or ends on a message of an earlier start's leader."""
    crew_directory = tmp_path / "data.partial" / "crew"
    for state in ("failed", "done", "go"):
        crew_directory.mkdir(parents=True)
        said = {
            "run": "old",
            "host": "host-0",
            "number": 9,
            "state": state,
            "message": "out of memory",
        }
        (crew_directory / "0.json").write_text(json.dumps(said))
        output = tmp_path / "data"
        assert together(
            preparing(folder, output, 0, 2, late_s=0.25), preparing(folder, output, 1, 2)
        ) == [None, None]
        assert tree(output) == tree(whole)
        shutil.rmtree(output)
