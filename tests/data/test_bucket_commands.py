"""Whole commands and killed processes with prepared data in a bucket."""

import itertools
import json
import os
import signal
import subprocess
import sys

import pytest

from imagen_jax.data import records
from imagen_jax.data.shard_cache import Place, ShardCache
from tests import tiny
from tests.data import test_bucket_data
from tests.data.test_bucket_data import SHARD, remote_config, shards_in
from tests.data.test_pipeline import config, take

server, local, remote = (getattr(test_bucket_data, name) for name in ("server", "local", "remote"))


def run(command, *options, env):
    """Runs a command; returns its standard error."""
    done = subprocess.run(
        [sys.executable, "-m", f"imagen_jax.{command}", *options],
        env=os.environ | env | {"PYTHONPATH": str(tiny.ROOT)},
        cwd=tiny.ROOT,
        stderr=subprocess.PIPE,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    return done.stderr


@pytest.mark.slow
def test_training_and_evaluation_give_the_same_numbers(local, remote, server, tmp_path):
    """Catches a command that opens data in a bucket without its cache, or refuses it."""
    base = ["--config=configs/base_64.py:tiny", "--config.text.dim=8"]
    base += ["--config.data.text_length=6", "--config.data.batch_size=8", "--config.train.steps=4"]
    base += ["--config.data.workers=1", "--config.train.validate_every=4"]
    base += ["--config.train.validate_rows=2", "--config.train.log_every=1"]
    found = []
    for name, path in (("local", local), ("remote", remote)):
        work, cache = tmp_path / name, tmp_path / "cache"
        options = [*base, f"--config.data.path={path}", f"--config.data.shard_cache_dir={cache}"]
        said = run("train", *options, f"--workdir={work}", env=server)
        assert ("copying 8 shards" in said) == (path is remote)
        rows = [json.loads(line) for line in (work / "metrics.jsonl").read_text().splitlines()]
        measured = ["--rows=2", "--bins=2", f"--output={work}/e", f"--shard_cache_dir={cache}2"]
        run("evaluate", f"--checkpoint={work}", f"--data={path}", *measured, env=server)
        result = json.loads((work / "e" / "evaluation.json").read_text())
        result.pop("provenance")
        found.append(([row["loss"] for row in rows], result))
    assert found[0] == found[1] and shards_in(tmp_path / "cache2")


READER = """
import itertools, json, sys
from imagen_jax.data import pipeline
print("started", flush=True)
reader = pipeline.batches(json.loads(sys.argv[1]), 0, 0)
for batch in itertools.islice(reader, 6):
    print(batch["index"].tolist(), flush=True)
reader.close()
"""


@pytest.mark.slow
def test_killed_processes_share_a_cache(local, remote, server, tmp_path):
    """Catches a part of a shard under its name, a lock that stays, and files of killed processes
    that fill the cache.
    """
    cfg = remote_config(remote, tmp_path)
    env = os.environ | server | {"PYTHONPATH": str(tiny.ROOT)}
    command = [sys.executable, "-c", READER, json.dumps(cfg)]
    start = lambda: subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=env)
    entries = records.Prepared(local).manifest["shards"]
    for _ in range(3):
        killed = start()
        assert killed.stdout.readline() == "started\n"
        while not list((tmp_path / "cache").rglob(".*.tmp")) and killed.poll() is None:
            pass
        killed.send_signal(signal.SIGKILL)
        killed.wait()
        for path in (tmp_path / "cache").rglob("*array_record*"):
            if not path.name.startswith("."):
                assert path.stat().st_size == entries[f"{path.parent.name}/{path.name}"]["bytes"]
    both = [start(), start()]
    wanted = [str(batch["index"].tolist()) for batch in take(6, config(local))]
    for process in both:
        out, _ = process.communicate(timeout=120)
        assert out.splitlines()[1:] == wanted
    ShardCache(remote, "x", Place(str(tmp_path / "cache"))).open(
        SHARD, entries[SHARD]
    )  # makes room
    assert not list((tmp_path / "cache").rglob(".*.tmp"))
    assert list(itertools.chain(both))
