"""metrics.jsonl after kills and resumes, TensorBoard, images, step times, progress in logs."""

import io
import json
import os
import signal
import struct
import subprocess
import sys

import numpy as np
import pytest
from PIL import Image

from imagen_jax.run_log import VALIDATION, MetricsWriter, Progress, StepClock, read_metrics
from imagen_jax.wandb_log import WandbLog


def write(workdir, start_step, steps):
    writer = MetricsWriter(workdir, start_step)
    for step in steps:
        writer.scalars(step, {"loss": step / 8})
    writer.close()


def steps_of(workdir):
    return [row["step"] for row in read_metrics(workdir)]


def test_rows_hold_exact_values(tmp_path):
    """Catches rounding in the record: an fp32 loss must come back bit for bit."""
    loss = np.float32(0.1) / np.float32(3)
    write(tmp_path, 0, [])
    writer = MetricsWriter(tmp_path, 0)
    writer.scalars(1, {"loss": loss, "images": 64, "time/step_s": 0.25})
    writer.close()
    (row,) = read_metrics(tmp_path)
    assert row == {"step": 1, "loss": float(loss), "images": 64, "time/step_s": 0.25}
    assert np.float32(row["loss"]) == loss and isinstance(row["images"], int)


def test_resume_drops_later_rows_and_only_those(tmp_path):
    """Catches a resume that keeps later rows (duplicates) or drops the resumed step (a gap)."""
    write(tmp_path, 0, range(1, 8))
    write(tmp_path, 5, [6, 7, 8])
    assert steps_of(tmp_path) == [1, 2, 3, 4, 5, 6, 7, 8]
    write(tmp_path, 0, [1])
    assert steps_of(tmp_path) == [1]


def test_validations_before_the_resumed_step_stay(tmp_path):
    """Catches validations that are cut with the rows of metrics.jsonl, which a resume writes again
    from an earlier step; ones of later steps that stay; and a curve of TensorBoard without them.
    """
    writer = MetricsWriter(tmp_path, 0)
    for step in (2, 4, 6):
        writer.validation(step, {"heldout/ema/loss": step / 8})
    writer.close()
    MetricsWriter(tmp_path, 2, validated=5).close()
    assert [row["step"] for row in read_metrics(tmp_path, VALIDATION)] == [2, 4]
    assert read_metrics(tmp_path) == []
    scalars = [(e.step, v.simple_value) for e in board_events(tmp_path) for v in e.summary.value]
    assert scalars == [(2, 0.25), (4, 0.5), (6, 0.75), (4, 0.5)]


@pytest.mark.parametrize(
    "torn", [b'{"step": 4, "lo', b'{"step": 4', b"4", b"\xff\x00\x00", b"null", b'{"loss": 1}']
)
def test_torn_last_line_is_dropped(tmp_path, torn):
    """Catches a reader that raises on a line cut short by a kill, and one that appends to it."""
    write(tmp_path, 0, [1, 2, 3])
    with (tmp_path / "metrics.jsonl").open("ab") as file:
        file.write(torn)
    assert steps_of(tmp_path) == [1, 2, 3]
    write(tmp_path, 10, [11])
    lines = (tmp_path / "metrics.jsonl").read_text().splitlines()
    assert [json.loads(line)["step"] for line in lines] == [1, 2, 3, 11]


def test_last_line_whole_but_for_its_newline_is_kept(tmp_path):
    """Catches the next row appended to a complete line that lacks its newline."""
    write(tmp_path, 0, [1, 2])
    path = tmp_path / "metrics.jsonl"
    path.write_bytes(path.read_bytes().rstrip(b"\n"))
    write(tmp_path, 2, [3])
    assert [json.loads(line)["step"] for line in path.read_text().splitlines()] == [1, 2, 3]


def test_truncation_is_atomic(tmp_path, monkeypatch):
    """Catches truncation in place: a kill during the rewrite would lose the whole record."""
    write(tmp_path, 0, [1, 2, 3])

    def killed(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(os, "replace", killed)
    with pytest.raises(KeyboardInterrupt):
        MetricsWriter(tmp_path, 1)
    assert steps_of(tmp_path) == [1, 2, 3]
    monkeypatch.undo()
    write(tmp_path, 1, [2])
    assert steps_of(tmp_path) == [1, 2]


def test_rows_survive_kill_and_no_jax_is_imported(tmp_path):
    """Catches rows that stay in a buffer until close, and an import of jax by the module."""
    code = (
        "import os, signal, sys; from imagen_jax.run_log import MetricsWriter; w ="
        " MetricsWriter(sys.argv[1], 0)\nfor n in (1, 2, 3): w.scalars(n, {'loss': n})\nassert"
        " 'jax' not in sys.modules; os.kill(os.getpid(), signal.SIGKILL)"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, str(tmp_path)], capture_output=True, text=True
    )
    assert done.returncode == -signal.SIGKILL, done.stderr
    assert steps_of(tmp_path) == [1, 2, 3]


def board_events(workdir):
    from tensorboardX.proto.event_pb2 import Event

    events = []
    for path in sorted((workdir / "tensorboard").iterdir()):
        data, at = path.read_bytes(), 0
        while at < len(data):
            (length,) = struct.unpack_from("<Q", data, at)
            events.append(Event.FromString(data[at + 12 : at + 12 + length]))
            at += 16 + length
    return events


def test_tensorboard_gets_scalars_and_forgets_later_steps(tmp_path):
    """Catches curves that repeat the steps between the checkpoint and the kill."""
    write(tmp_path, 0, [1, 2, 3])
    write(tmp_path, 2, [3])
    events = board_events(tmp_path)
    start = type(events[0].session_log).START
    assert [e.step for e in events if e.session_log.status == start] == [1, 3]
    scalars = [(e.step, v.tag, v.simple_value) for e in events for v in e.summary.value if v.tag]
    assert scalars == [
        (1, "loss", 0.125),
        (2, "loss", 0.25),
        (3, "loss", 0.375),
        (3, "loss", 0.375),
    ]


def test_tensorboard_shows_the_config(tmp_path):
    """Catches a config at the wrong step, and a text that Markdown makes one paragraph of."""
    writer = MetricsWriter(tmp_path, 40)
    writer.begin({"name": "base", "optim": {"lr": 0.1}}, WandbLog(tmp_path, "", {}))
    writer.close()
    (shown,) = [
        (event.step, value.tag, value.tensor.string_val[0].decode())
        for event in board_events(tmp_path)
        for value in event.summary.value
        if value.tag.startswith("config")
    ]
    assert shown[:2] == (40, "config/text_summary")
    lines = shown[2].split("\n")
    assert all(line.startswith("    ") for line in lines)
    assert json.loads(shown[2]) == {"name": "base", "optim": {"lr": 0.1}}


def test_image_is_written_as_png(tmp_path):
    """Catches swapped axes or channels, a lossy format, and a half-written file under the final
    name.
    """
    image = np.random.default_rng(0).integers(0, 256, (6, 9, 3), dtype=np.uint8)
    writer = MetricsWriter(tmp_path, 0)
    path = writer.image(40, "samples/ema", image)
    with pytest.raises((ValueError, TypeError)):
        writer.image(40, "samples/ema", image.astype(np.float32))
    writer.close()
    assert path == tmp_path / "images" / "samples" / "ema" / "00000040.png"
    with Image.open(path) as stored:
        assert stored.format == "PNG" and np.array_equal(np.asarray(stored), image)
    assert [p.name for p in path.parent.iterdir()] == [path.name]
    assert any(
        v.tag == "samples/ema" and v.image.width == 9
        for e in board_events(tmp_path)
        for v in e.summary.value
    )


def test_values_that_are_no_scalars_are_refused(tmp_path):
    """Catches an array or a text in the record, and a refused row that is written in part."""
    writer = MetricsWriter(tmp_path, 0)
    for bad in (np.zeros(2), np.zeros(1), "text", None):
        with pytest.raises(ValueError, match="metric grad/norm"):
            writer.scalars(1, {"loss": 1.0, "grad/norm": bad})
    writer.close()
    assert read_metrics(tmp_path) == []


def test_disabled_writer_leaves_no_trace(tmp_path):
    """Catches the second process of a run that truncates or writes the record of the first."""
    write(tmp_path, 0, [1, 2])
    before = sorted(tmp_path.rglob("*"))
    writer = MetricsWriter(tmp_path, 0, enabled=False)
    writer.scalars(1, {"loss": 1.0})
    assert writer.image(1, "x", np.zeros((2, 2, 3), np.uint8)) is None
    writer.close()
    assert sorted(tmp_path.rglob("*")) == before and steps_of(tmp_path) == [1, 2]


class Clock:
    time = 100.0

    def __call__(self):
        return self.time


def test_step_clock_divides_by_steps_and_leaves_pauses_out():
    """Catches evaluation time that is counted, a nested pause counted twice, a pause counted in the
    next reading, steps counted from zero.
    """
    now = Clock()
    clock = StepClock(batch_size=32, step=50, now=now)
    now.time += 10
    with clock.pause():
        now.time += 5
        with clock.pause():
            now.time += 2
    times = {"time/step_s": 0.5, "time/images_per_s": 64.0, "time/data_share": 0.0}
    assert clock.read(70) == times
    now.time += 3
    with clock.waiting():
        now.time += 1
    times = {"time/step_s": 2.0, "time/images_per_s": 16.0, "time/data_share": 0.25}
    assert clock.read(72) == times
    now.time += 4
    assert clock.read(72) == {}
    now.time += 1
    assert clock.read(73)["time/step_s"] == 1.0
    with pytest.raises(RuntimeError, match="paused"), clock.pause():
        clock.read(74)  # would count the time up to now in this interval, and take it from the next


def test_step_clock_pause_ends_when_its_body_raises():
    """Catches a clock that stays paused after a failed evaluation."""
    now = Clock()
    clock = StepClock(1, 0, now)
    with pytest.raises(RuntimeError), clock.pause():
        now.time += 3
        raise RuntimeError
    now.time += 2
    assert clock.read(2)["time/step_s"] == 1.0


def test_progress_without_terminal_is_plain_lines():
    """Catches control characters in a log file, one line per step, a missing last line."""
    stream = io.StringIO()
    with Progress("train", total=100, start=40, interval_s=3600, stream=stream) as progress:
        for done in range(41, 101):
            progress.update(done, loss=0.125) if done == 50 else progress.update(done)
        progress.note("saved")
    lines = stream.getvalue().splitlines()
    assert (
        len(lines) == 2
        and lines[0].startswith("train: 100/100, ")
        and lines[0].endswith("loss 0.125")
        and lines[1] == "saved"
    )
    assert not set("\r\x1b") & set(stream.getvalue())


def test_progress_prints_once_an_interval(monkeypatch):
    """Catches an interval counted from the start, and a rate that counts steps before a resume."""
    now = Clock()
    monkeypatch.setattr("time.monotonic", now)
    stream = io.StringIO()
    progress = Progress("train", total=100, start=40, interval_s=10, stream=stream)
    for done in range(41, 61):
        now.time += 2
        progress.update(done)
    lines = stream.getvalue().splitlines()
    assert [line.split(",")[0] for line in lines] == [
        "train: 45/100",
        "train: 50/100",
        "train: 55/100",
        "train: 60/100",
    ]
    assert lines[-1] == "train: 60/100, 0.5/s, 80 s left"


def test_progress_on_a_terminal_is_a_bar():
    """Catches a bar that starts from zero after a resume."""

    class Terminal(io.StringIO):
        def isatty(self):
            return True

    stream = Terminal()
    with Progress("train", total=100, start=40, stream=stream) as progress:
        progress.update(100, loss=0.5)
    assert (
        "100/100" in stream.getvalue()
        and "40/100" in stream.getvalue()
        and "\r" in stream.getvalue()
    )
