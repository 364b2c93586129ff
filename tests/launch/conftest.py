"""Stand-ins for the tools of clusters, and options as the command line makes them."""

import json
import os
import sys
from pathlib import Path

import pytest
from absl import flags

from imagen_jax import storage
from launch import platforms, status, tpu_pod
from launch.job import Job
from tests import storage_emulator, tiny

HERE = Path(__file__).parent


@pytest.fixture(autouse=True)
def no_tools(tmp_path, monkeypatch):
    """Hides real cluster tools and the real home directory from the tests."""
    tools = tmp_path / "bin"
    tools.mkdir()
    for name in (
        "bash",
        "git",
        "tar",
        "gzip",
        "mkdir",
        "cat",
        "cp",
        "rm",
        "touch",
        "tail",
        "setsid",
        "nohup",
        "flock",
        "sleep",
        "dirname",
        "env",
        "grep",
    ):
        os.symlink(
            f"/usr/bin/{name}" if Path(f"/usr/bin/{name}").exists() else f"/bin/{name}",
            tools / name,
        )
    monkeypatch.setenv("PATH", str(tools))
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.setattr(
        tpu_pod, "uncommitted", lambda path: False
    )  # the tests also run on uncommitted changes
    return tools


@pytest.fixture(autouse=True)
def no_network(tmp_path, monkeypatch):
    """A bucket gs://NAME is the directory buckets/NAME here, which may not exist."""

    def path(label: str, text: str) -> Path:
        return Path(text.replace("gs://", f"{tmp_path}/buckets/"))

    monkeypatch.setattr(status, "as_path", path)


@pytest.fixture
def tool(no_tools):
    """tool(name, source): puts a Python program of that name on PATH."""

    def make(name: str, source: str) -> None:
        (no_tools / name).write_text(f"#!{sys.executable}\n{source}")
        (no_tools / name).chmod(0o755)

    return make


@pytest.fixture
def gcloud(tmp_path, tool, monkeypatch):
    """gcloud(*plans): installs the stand-in, with a plan per resource; returns its directory."""

    def make(*plans: dict) -> Path:
        state = tmp_path / "cloud"
        state.mkdir()
        (state / "plan.json").write_text(json.dumps(plans))
        monkeypatch.setenv("FAKE_GCLOUD", str(state))
        tool("gcloud", (HERE / "fake_gcloud.py").read_text())
        return state

    return make


def options(where: str, *more: str) -> flags.FlagValues:
    """The options of --where and `more`."""
    values = flags.FlagValues()
    platforms.define_flags(values, required=True)
    values(["launch", "--where", where, *more])
    return values


def job(workdir, steps: int = 0, **fields) -> Job:
    """A job of `steps` training steps, whose arguments contain characters that need quoting."""
    defaults = dict(
        name="run-1",
        arguments=(
            "-m",
            "imagen_jax.train",
            '--config.name=it\'s a "$HOME" `x`',
            f"--workdir={workdir}",
        ),
        workdir=str(workdir),
        retries=2,
    )
    config = tiny.config() | {"train": {"steps": steps}} if steps else {}
    return Job(**defaults | {"config": config} | fields)


@pytest.fixture(scope="module")
def bucket_server():
    """An emulator of Cloud Storage, set for this process."""
    with storage_emulator.used():
        yield


@pytest.fixture
def real_buckets(bucket_server, no_network, monkeypatch):
    """Undoes `no_network`: launch.status reads the buckets of the emulator."""
    monkeypatch.setattr(status, "as_path", storage.as_path)
