"""The table of trainings, from the files of their workdirs."""

import json
import math
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from imagen_jax.checksums import CHECKSUMS
from imagen_jax.distributed.host_failures import HostFailures
from imagen_jax.locks import is_locked, only_process
from launch import platforms, status
from tests.launch.conftest import job, options


def workdir(path: Path, step: int, steps: int = 100, checkpoints=()) -> Path:
    """A run after `step` steps of 20 images, at 10 images/s in the end, with these checkpoints."""
    path.mkdir(parents=True, exist_ok=True)
    (path / "config.json").write_text(
        json.dumps({"train": {"steps": steps}, "data": {"batch_size": 20}})
    )
    rows = [
        {"step": n, "loss": 1 / n, "time/images_per_s": 1000 if n < 20 else 10}
        for n in range(1, step + 1)
    ]
    (path / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    for name in checkpoints:
        (path / "checkpoints" / name).mkdir(parents=True)
        (path / "checkpoints" / name / CHECKSUMS).touch()
    return path


def test_a_running_training(tmp_path):
    """Catches an ignored lock, a rate over the first steps, and an incomplete checkpoint."""
    run = workdir(tmp_path / "base", 50, checkpoints=("20", "40", "50.writing"))
    with only_process(run, "training in"):
        row = status.read(job(run, stage="base"))
    assert (row.name, row.state, row.step, row.steps, row.checkpoint) == (
        "base",
        "running",
        50,
        100,
        40,
    )
    assert row.loss == 1 / 50 and row.images_per_s == 10 and row.left == 50 * 20 / 10
    assert status.read(job(run)).state == "stopped"


def test_the_time_that_is_left_has_saves(tmp_path):
    """Catches the rate of images without saves and validations taken for the pace."""
    run = workdir(tmp_path / "run", 50)
    steps = {"process": 0, "seconds": {"step": 20.0}}
    entries = [
        steps | {"start": 0.0, "end": 20.0, "from_step": 0, "to_step": 10},
        steps | {"start": 220.0, "end": 240.0, "from_step": 10, "to_step": 20},
    ]
    (run / "goodput.jsonl").write_text("".join(json.dumps(entry) + "\n" for entry in entries))
    assert status.read(job(run)).left == 50 * 240 / 20


LAST = {"process": 1, "start": 100.0, "end": 200.0, "from_step": 40, "to_step": 50}
SKIPS = "".join(f'{{"step": {n}, "action": "skipped"}}\n' for n in (2, 45, 46))


@pytest.mark.parametrize(
    "files, ended, state, words",
    [
        ({"nonfinite.json": '{"step": 51}'}, False, "failed", "exit code 3; loss, gradient or"),
        ({"nonfinite.json": '{"step": 51}'}, True, "stopped", ""),
        ({"bad_steps.jsonl": SKIPS}, False, "failed", "exit code 3; 3 of the last 1000 steps"),
        ({"bad_steps.jsonl": SKIPS[: SKIPS.index("\n", 60)]}, False, "stopped", ""),
        ({"bad_steps.jsonl": SKIPS.replace("4", "3")}, False, "stopped", ""),  # of process 0
        ({"failures/a-0.json": "150"}, False, "failed", "exit code 75; lost process 1"),
        ({"failures/a-0.json": "50"}, False, "stopped", ""),  # of process 0
        ({"launch/launch.json": "{}", "nonfinite.json": '{"step": "x"}'}, False, "unreadable", ""),
        ({}, False, "stopped", ""),
    ],
)
def test_a_training_that_failed_without_a_launcher(tmp_path, files, ended, state, words):
    """Catches a failure that looks like a stop, and one of an earlier process, or one that was
    continued to an orderly end, that is shown as the last one's.
    """
    run = workdir(tmp_path / "run", 50)
    (run / "config.json").write_text('{"train": {"steps": 100, "max_skips": 2}}')
    entry = LAST | {"seconds": {"step": 90.0}} | ({"ended": True} if ended else {})
    (run / "goodput.jsonl").write_text(json.dumps(entry) + "\n")
    for name, text in files.items():
        (run / name).parent.mkdir(exist_ok=True)
        if name.startswith("failures"):
            record = {"time": float(text), "host": "h", "process": 1, "code": 75}
            text = json.dumps(record | {"reason": "lost process 1"})
        (run / name).write_text(text)
    row = status.read(job(run))
    assert row.state == state
    assert row.detail.startswith(words) if words or state != "stopped" else not row.detail
    if "nonfinite.json" in files and state == "failed":
        os.utime(run / "nonfinite.json", (50, 50))  # of process 0
        assert status.read(job(run)).state == "stopped"


def test_hosts_that_failed_are_named(tmp_path, capsys):
    """Catches a host whose failures stay unknown, one that is to be removed after one failure, and
    failures that do not say which run had them.
    """
    for name, failed in (("a", ["x", "y"]), ("b", ["x", "y", "x"]), ("c", [])):
        run = workdir(tmp_path / name, 5)
        for n, host in enumerate(failed):
            HostFailures(run, f"{n}-ab").record(0, host, 75, "no\nheartbeat")
    assert status.main([str(tmp_path)]) == 0
    *table, first, second, third, fourth = capsys.readouterr().out.splitlines()
    assert len(table) == 4 and not any("host" in line for line in table)
    assert first.startswith("a: host x failed once in this run, at 20")
    assert second.startswith("a: host y failed once") and fourth.startswith("b: host y failed once")
    assert third.startswith("b: host x failed 2 times in this run, last at 20")
    assert third.endswith("with exit code 75 (no heartbeat): remove it from the job")
    assert "remove" not in first + second + fourth


def test_the_ends_of_a_training(tmp_path):
    """Catches a stopped run shown as finished, a finished one as stopped, and a lost reason."""
    assert status.read(job(tmp_path / "none")).state == "not started"
    done = job(workdir(tmp_path / "done", 100))
    assert status.read(done).state == "stopped"  # the last checkpoint is incomplete
    assert (
        status.read(job(workdir(tmp_path / "done", 100, checkpoints=("100",)))).state == "finished"
    )
    stopped = job(workdir(tmp_path / "stopped", 60))
    status.write_state(stopped, "local", "finished")  # a stopped training exits with 0 as well
    assert status.read(stopped).state == "stopped"
    failed = job(workdir(tmp_path / "failed", 60))
    status.write_state(failed, "local", "failed", "exit code 2; error: out of memory")
    assert (status.read(failed).state, status.read(failed).detail) == (
        "failed",
        "exit code 2; error: out of memory",
    )
    assert (
        status.read(job(tmp_path / "done", steps=200)).state == "stopped"
    )  # the same run with more steps


def test_lost_rows_do_not_undo_a_training(tmp_path):
    """Catches a finished run that is submitted again because rows of metrics are lost."""
    run = job(workdir(tmp_path / "run", 30, checkpoints=("100",)))
    assert (status.read(run).state, status.read(run).step, status.read(run).detail) == (
        "finished",
        100,
        "metrics.jsonl ends at step 30",
    )
    (tmp_path / "run" / "metrics.jsonl").unlink()
    assert (status.read(run).state, status.read(run).detail) == (
        "finished",
        "metrics.jsonl ends at step 0",
    )


def test_an_emptied_checkpoint_does_not_end_a_training(tmp_path):
    """Catches a directory with the last step's name taken for a complete checkpoint."""
    run = workdir(tmp_path / "run", 100, checkpoints=("80", "100"))
    (run / "checkpoints" / "100" / CHECKSUMS).unlink()
    assert (status.read(job(run)).state, status.read(job(run)).checkpoint) == ("stopped", 80)


DAMAGE = [
    ("config.json", "[1, 2]"),
    ("config.json", '{"train": '),
    ("config.json", '{"train": {"steps": "x"}}'),
    ("config.json", '{"train": [1]}'),
    ("config.json", '{"data": {"batch_size": -1}}'),
    ("launch/launch.json", "no"),
    ("launch/launch.json", '{"steps": "abc"}'),
    ("launch/launch.json", '{"state": ["running"]}'),
    ("launch/launch.json", '{"state": "failed", "detail": 3}'),
    ("launch/launch.json", "[" * 50_000),
    (
        "metrics.jsonl",
        '{"step": 12, "loss": "abc", "time/images_per_s": "x"}\n{"step": 13, "loss": [1]}\n',
    ),
    ("metrics.jsonl", '{"step": 13, "time/images_per_s": "x"}\n'),
    ("metrics.jsonl", '{"step": 1' + "0" * 400 + "}\n"),
]


@pytest.mark.parametrize("file, content", DAMAGE)
def test_a_damaged_file_is_named_and_hides_no_other_run(tmp_path, capsys, file, content):
    """Catches a traceback instead of the table, and an error that does not name the file."""
    workdir(tmp_path / "good", 10)
    (workdir(tmp_path / "bad", 10) / "launch").mkdir()
    (tmp_path / "bad" / file).write_text(content)
    assert status.main([str(tmp_path)]) == 0
    _, bad, good = capsys.readouterr().out.splitlines()
    assert "unreadable" in bad and f"{file} is damaged" in bad and "stopped" in good


@pytest.mark.parametrize("file", ["config.json", "launch/launch.json", "metrics.jsonl"])
def test_a_directory_in_the_place_of_a_file_is_named(tmp_path, capsys, file):
    """Catches a traceback instead of the table or the dry run."""
    workdir(tmp_path / "good", 10)
    (workdir(tmp_path / "bad", 10) / file).unlink(missing_ok=True)
    (tmp_path / "bad" / file).mkdir(parents=True)
    assert status.main([str(tmp_path)]) == 0
    _, bad, good = capsys.readouterr().out.splitlines()
    assert "unreadable" in bad and f"bad/{file} is not a file" in bad and "stopped" in good
    assert platforms.start([job(tmp_path / "bad")], options("local", "--dry-run")) == 0
    assert f"{file} is not a file" in capsys.readouterr().out


def test_numbers_without_bounds_are_no_traceback(tmp_path, capsys):
    """Catches an infinite time converted to minutes."""
    run = workdir(tmp_path / "run", 1)
    (run / "metrics.jsonl").write_text('{"step": 1, "loss": NaN, "time/images_per_s": 1e-320}\n')
    assert status.main([str(run)]) == 0
    assert capsys.readouterr().out.splitlines()[1].split()[:4] == ["run", "stopped", "1/100", "-"]


@pytest.mark.parametrize(
    "text, message",
    [
        ("", "WORKDIR is empty"),
        ("gs://", "has no bucket name"),
        ("nowhere", "nowhere is not a directory"),
    ],
)
def test_a_workdir_that_is_none_is_one_line(text, message, capsys):
    """Catches an unset variable taken for the current directory, and gs:// without a bucket."""
    assert status.main([text]) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ") and message in error and error.count("\n") == 1


def test_a_failed_job_is_failed_while_its_launcher_looks_after_others(tmp_path):
    """Catches a launcher's lock that makes all of its jobs appear to run."""
    one_job = job(workdir(tmp_path / "run", 10))
    with only_process(one_job.record, "launching in"):
        for state, shown in {
            "failed": "failed",
            "running": "running",
            "preempted": "preempted",
        }.items():
            status.write_state(one_job, "tpu", state)
            assert status.read(one_job).state == shown


def test_half_a_line_is_passed_over(tmp_path):
    """Catches a table that fails while a row is written, or when the tail starts inside a row."""
    run = workdir(tmp_path / "run", 2000, steps=9000)
    with open(run / "metrics.jsonl", "a") as file:
        file.write('{"step": 2001, "lo')
    assert (run / "metrics.jsonl").stat().st_size > status.TAIL_BYTES
    assert status.read(job(run)).step == 2000


def test_the_table(tmp_path, capsys):
    """Catches columns without values, and checkpoints or logs taken for trainings."""
    for name, step in {"base": 50, "sr 256": 0, "sr_1024": 100}.items():
        workdir(
            tmp_path / name,
            step,
            checkpoints=["40", str(step)] if step == 100 else ["40"] * (step > 0),
        )
    (tmp_path / "base" / "checkpoints" / "40" / "config.json").touch()
    assert status.main([str(tmp_path)]) == 0
    lines = [line.split() for line in capsys.readouterr().out.splitlines()]
    last = ["checkpoint", "goodput", "losses"]
    assert lines[0] == ["stage", "state", "step", "loss", "images/s", "left", *last]
    left = ["1", "min", "40", "s"]
    assert lines[1] == ["base", "stopped", "50/100", "0.0200", "10", *left, "40", "-", "-"]
    assert lines[2] == ["sr", "256", "not", "started", "0/100", *6 * ["-"]]
    assert lines[3] == ["sr_1024", "finished", "100/100", "0.0100", "10", "-", "100", "-", "-"]


def test_goodput_and_the_largest_losses(tmp_path, capsys):
    """Catches the share of lost steps shown as goodput, the smallest losses in the place of the
    largest, and a run of an earlier version without a row.
    """
    workdir(tmp_path / "old", 50)
    run = workdir(tmp_path / "run", 50)
    entries = [
        {"process": 0, "start": 0.0, "end": 100.0, "from_step": 0, "to_step": 50},
        {"process": 1, "start": 130.0, "end": 200.0, "from_step": 45, "to_step": 50},
    ]
    entries[0]["seconds"] = {"step": 60.0, "compile": 20.0, "data": 18.0, "other": 2.0}
    entries[1]["seconds"] = {"step": 64.0, "start": 6.0}
    text = "".join(json.dumps(entry) + "\n" for entry in entries)
    (run / "goodput.jsonl").write_text(text + '{"process": 1, "sta')
    assert status.main([str(tmp_path)]) == 0
    _, old, new = capsys.readouterr().out.splitlines()
    assert old.split()[-2:] == ["-", "-"]
    assert new.endswith(" 59 %     down 15 %, compile 10 %, data 9 %")


def test_trainings_at_any_depth(tmp_path):
    """Catches a training that is missed deep in a sweep, one that has not yet a row, a part
    of a checkpoint taken for a training, and one that is found twice, through a link or inside
    another.
    """
    workdir(tmp_path / "sweep" / "arm_1" / "base", 5)
    (workdir(tmp_path / "sweep" / "arm_2", 5) / "overfit").mkdir()
    (tmp_path / "sweep" / "arm_2" / "overfit" / "metrics.jsonl").touch()
    (tmp_path / "new").mkdir()
    (tmp_path / "new" / "goodput.jsonl").touch()
    (tmp_path / "started" / "checkpoints" / "5").mkdir(parents=True)
    (tmp_path / "started" / "checkpoints" / "5" / "metrics.jsonl").touch()
    (tmp_path / "sweep" / "link").symlink_to(tmp_path / "sweep")
    found = [title for title, _ in status.inside(str(tmp_path))]
    assert found == ["new", "sweep/arm_1/base", "sweep/arm_2"]


@pytest.mark.parametrize(
    "seconds, text", [(59.9, "0 min 59 s"), (3600, "1 h 00 min"), (90061, "1 d 01 h")]
)
def test_spans(seconds, text):
    """Catches hours shown as days."""
    assert status.span(seconds) == text


def test_looking_does_not_disturb(tmp_path):
    """Catches a look at the lock that prevents a run from starting."""
    source = (
        "import sys, time; from pathlib import Path; from imagen_jax import locks\nwhile True:"
        " locks.is_locked(Path(sys.argv[1])); time.sleep(0.001)"
    )
    looking = subprocess.Popen([sys.executable, "-c", source, str(tmp_path)])
    try:
        end = time.monotonic() + 1
        while time.monotonic() < end:
            with only_process(tmp_path, "training in"):
                assert is_locked(tmp_path)
    finally:
        looking.kill()
        looking.wait()
    assert not is_locked(tmp_path) and not is_locked(tmp_path / "nowhere")


@pytest.mark.parametrize(
    "state, starts", [("finished", False), ("running", False), ("stopped", True)]
)
def test_nothing_is_started_twice(tmp_path, monkeypatch, capsys, state, starts):
    """Catches a second training in the workdir of a finished or running one."""
    one_job = job(
        workdir(tmp_path / "run", 100, checkpoints=["100"])
        if state == "finished"
        else workdir(tmp_path / "run", 50)
    )
    ran = []
    monkeypatch.setattr(platforms.local, "run", lambda jobs, _: ran.extend(jobs) or 0)
    with only_process(tmp_path / ("run" if state == "running" else "other"), "training in"):
        assert platforms.start([one_job], options("local")) == 0
    assert bool(ran) == starts and ("not started again" in capsys.readouterr().out) != starts


def test_numbers_that_are_not_known():
    """Catches nan in the table, and a division by a rate of zero."""
    assert status.table([status.Row("a", left=math.nan)]).splitlines()[1].split() == [
        "a",
        "not",
        "started",
        "0",
        *6 * ["-"],
    ]
