"""The time of a run that is killed again and again, beside the time that a clock outside measures.

IMAGEN_JAX_KILLS sets the number of kills; by default five.
"""

import os
import random
import signal
import time

import pytest

from imagen_jax.goodput import CATEGORIES, WRITE_S, read_entries, summarise
from imagen_jax.run_log import read_metrics
from tests import processes, tiny
from tests.data import synthetic

KILLS = int(os.environ.get("IMAGEN_JAX_KILLS", "5"))
MOST_S = 6.0  # that a process trains
pytestmark = [pytest.mark.slow, pytest.mark.timeout(300 + 60 * KILLS)]


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return synthetic.write_prepared(
        tmp_path_factory.mktemp("prepared") / "data", images=24, size=32
    )


def start(data, workdir, logs):
    command = [
        "-m",
        "imagen_jax.train",
        f"--config={tiny.ROOT}/configs/sr_1024.py:tiny",
        f"--workdir={workdir}",
        f"--config.data.path={data}",
        f"--config.text.dim={synthetic.DIM}",
        "--config.train.steps=1000000",
        "--config.train.save_every=20",
        "--config.train.validate_every=25",
        "--config.train.validate_rows=3",
        "--config.train.log_every=1",
        *tiny.ONE_LEVEL,
    ]
    (process,) = processes.start(lambda _: command, logs, processes=1, devices=1)
    return process


def wait_until(condition, process, seconds=240):
    end = time.monotonic() + seconds
    while not condition():
        assert process.poll() is None, "the run ended by itself"
        assert time.monotonic() < end
        time.sleep(0.01)


def test_the_ledger_adds_up(data, tmp_path):
    """Catches time without a category, time in two categories, a killed process that leaves less
    than it has written, and steps that count as kept although a later process does them again.
    """
    rng, workdir, began, spans = random.Random(KILLS), tmp_path / "run", time.time(), []
    resumed = []

    for number in range(KILLS + 1):
        started, logs = time.time(), tmp_path / f"attempt_{number}"
        process = start(data, workdir, logs)
        log = lambda path=processes.log_of(logs, 0): path.read_text(errors="replace")
        compiling = number == 1  # one of them is killed while it compiles
        wait_until(lambda: ("% sharded" if compiling else "are compared") in log(), process)
        time.sleep(rng.uniform(1, 3 if compiling else MOST_S))
        process.send_signal(signal.SIGTERM if number == KILLS else signal.SIGKILL)
        if number == KILLS:  # Python itself takes a second or two to end
            wait_until(lambda: "saved in" in log(), process)
            ended = time.time()
        assert process.wait(timeout=60) == (0 if number == KILLS else -signal.SIGKILL)
        ended = ended if number == KILLS else time.time()
        spans.append(ended - started)
        resumed.append("resuming from step" in log())
    wall, entries = ended - began, read_entries(workdir)
    summary = summarise(entries)
    print(f"{wall:.1f} s outside, {summary.wall_s:.1f} s in the ledger: {summary.seconds}")
    assert summary.wall_s == pytest.approx(wall, rel=0.02)
    assert sum(summary.seconds.values()) == pytest.approx(summary.wall_s)
    for number, span in enumerate(spans):
        seconds = [e["seconds"] for e in entries if e["process"] == number]
        told = sum(sum(one.values()) for one in seconds)
        print(f"process {number}: {span:.2f} s outside, {told:.2f} s in the ledger")
        assert span - WRITE_S - 1.5 < told < span + 0.1
    check_steps(entries, summary, read_metrics(workdir)[-1]["step"])
    assert any(resumed) and set(CATEGORIES) - {"other"} <= summary.seconds.keys()


def check_steps(entries, summary, last):
    """Compares kept and lost steps with a count of them."""
    made = sum(entry["to_step"] - entry["from_step"] for entry in entries)
    total = summary.seconds["step"] + summary.seconds["lost"]
    assert made > last and summary.ended
    # Steps take about the same time.
    assert summary.seconds["lost"] / total == pytest.approx((made - last) / made, abs=0.15)
