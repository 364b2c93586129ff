"""Refusals of JAX, the file system and the terminal: one line with what to do, and an exit code."""

import errno
import io
import logging
import os
import re
import subprocess
import sys
from pathlib import Path

import jax
import pytest
from absl import flags
from ml_collections import config_flags

from imagen_jax import cli, output_paths
from imagen_jax.weights.checkpoint import CheckpointError
from tests import tiny

ROOT = Path(__file__).resolve().parent.parent


def guarded(capsys, error: BaseException) -> tuple[int, str]:
    """(exit code, line on standard error) of a command that raises `error`."""

    def main():
        raise error

    code = cli.guard(main)
    (line,) = capsys.readouterr().err.splitlines()
    return code, line


def os_error(number: int) -> OSError:
    return OSError(number, os.strerror(number), "out/0000_cat.png")


OOM = "RESOURCE_EXHAUSTED: Out of memory allocating 99 bytes.\nmore lines"
CASES = {
    "disk full": (os_error(errno.ENOSPC), 1, "error: out/0000_cat.png: No space .*; free some"),
    "quota": (os_error(errno.EDQUOT), 1, "0000_cat.png: Disk quota exceeded; free some space"),
    "file size": (os_error(errno.EFBIG), 2, "0000_cat.png: File too large; .*`ulimit -f`"),
    "closed pipe": (os_error(errno.EPIPE), 2, "Broken pipe; .*write the output to a file"),
    "read-only": (os_error(errno.EROFS), 2, "0000_cat.png: Read-only file system; give a dir"),
    "not permitted": (os_error(errno.EACCES), 2, "Permission denied; check its permissions"),
    "missing": (os_error(errno.ENOENT), 2, "0000_cat.png: No such file or directory; check"),
    "no answer": (os_error(errno.ESTALE), 1, "0000_cat.png: Stale file handle; .*run the same"),
    "a message alone": (OSError("the hub is down"), 2, "error: the hub is down$"),
    "device memory": (jax.errors.JaxRuntimeError(OOM), 2, "out of device memory: use a smaller"),
    "lost connection": (jax.errors.JaxRuntimeError("UNAVAILABLE: reset"), 1, "run the same"),
    "host memory": (MemoryError(), 1, "out of host memory: use smaller batches"),
    "device in use": (RuntimeError("Unable to initialize backend 'tpu': busy"), 1, "'tpu': busy;"),
    "unknown device": (
        RuntimeError("Unable to initialize backend 'x': not in the list of known backends: y"),
        2,
        "set JAX_PLATFORMS=cpu",
    ),
    "missing package": (ImportError("x.model needs sentencepiece: pip install it"), 2, "pip inst"),
    "invalid input": (ValueError("--seed is wrong"), 2, "error: --seed is wrong"),
}


@pytest.mark.parametrize("case", CASES)
def test_a_refusal_is_one_line_with_its_exit_code(case, capsys):
    """Catches a traceback, a line without the file or without advice, and the wrong exit code."""
    error, code, message = CASES[case]
    actual, line = guarded(capsys, error)
    assert actual == code
    assert re.search(message, line), line


def test_the_cause_decides_about_a_retry(capsys):
    """Catches exit code 2 for a save that failed because the disk was full."""
    error = CheckpointError("checkpoint 8 was not saved")
    error.__cause__ = os_error(errno.ENOSPC)
    assert guarded(capsys, error) == (1, "error: checkpoint 8 was not saved")


def test_bugs_keep_their_traceback(capsys, monkeypatch):
    """Catches a handler that hides errors nobody foresaw, or IMAGEN_JAX_TRACEBACK ignored."""
    for error in (KeyError("x"), RuntimeError("x"), jax.errors.JaxRuntimeError("INTERNAL: x")):
        with pytest.raises(type(error)):
            guarded(capsys, error)
    monkeypatch.setenv("IMAGEN_JAX_TRACEBACK", "1")
    with pytest.raises(ValueError):
        guarded(capsys, ValueError("x"))


def test_a_platform_that_is_absent(capsys, monkeypatch):
    """Catches JAX_PLATFORMS=cuda that computes on the CPU without a word, or ends in a traceback
    of jax's AssertionError.
    """
    monkeypatch.setenv("JAX_PLATFORMS", "cuda")
    with pytest.raises(ValueError, match="JAX_PLATFORMS=cuda, but JAX found no such device: "):
        cli.check_platform()
    code, line = guarded(capsys, AssertionError())
    assert code == 2 and "JAX found no such device" in line
    for platforms in ("", "cpu", "cuda,cpu"):
        monkeypatch.setenv("JAX_PLATFORMS", platforms)
        cli.check_platform()
        with pytest.raises(AssertionError):
            guarded(capsys, AssertionError())


def test_a_plugin_that_does_not_load_is_one_line(capsys, monkeypatch):
    """Catches the traceback that JAX logs if a driver is missing, before the error's own line."""
    monkeypatch.setattr(logging.getLogger(), "handlers", [])  # pytest's own come back
    cli.log_to_stderr()
    try:
        raise RuntimeError("Unable to load CUDA. Is it installed?")
    except RuntimeError:
        logging.getLogger("jax._src.xla_bridge").exception("plugin %s failed", "cuda")
    assert capsys.readouterr().err == "plugin cuda failed: Unable to load CUDA. Is it installed?\n"


def test_a_failing_thread_of_orbax_is_one_line(capsys, monkeypatch):
    """Catches three tracebacks for each checkpoint that a full disk refuses."""
    monkeypatch.setattr(logging.getLogger(), "handlers", [])
    cli.log_to_stderr()
    try:
        raise ValueError("No space left on device")
    except ValueError as error:
        logging.getLogger("absl").exception("thread raised an exception: %s", error)
    assert capsys.readouterr().err == "thread raised an exception: No space left on device\n"


def test_a_terminal_in_ascii_gets_escapes(monkeypatch):
    """Catches a prompt in another script that ends the run when it is printed."""
    stream = io.TextIOWrapper(io.BytesIO(), encoding="ascii")
    monkeypatch.setattr(sys, "stdout", stream)
    cli.escape_unprintable()
    print("warning: 苹果 \udcff")
    stream.flush()
    assert stream.buffer.getvalue() == b"warning: \\u82f9\\u679c \\udcff\n"


def test_directories_that_cannot_be_written_are_refused(tmp_path, monkeypatch):
    """Catches results that are computed before their directory turns out to be read-only."""
    output_paths.make_directory("output", str(tmp_path / "a" / "b"))
    assert (tmp_path / "a" / "b").is_dir()

    def read_only(*_, **__):
        raise os_error(errno.EROFS)

    monkeypatch.setattr(os, "makedirs", read_only)
    with pytest.raises(ValueError, match="--output .*/c cannot be written to: Read-only .*; give"):
        output_paths.make_directory("output", str(tmp_path / "c"))
    for check in (output_paths.check_directory, output_paths.make_directory):
        with pytest.raises(ValueError, match="--output gs:/b/x is a URL, only local paths work"):
            check("output", str(Path("gs://b/x")))


URLS = {
    "export from": ("export", ["--checkpoint=s3://b/run", "--output=x.safetensors"]),
    "export to": ("export", ["--checkpoint=gone", "--output=s3://b/x.safetensors"]),
    "sample": ("sample", ["--config=configs/cascade.py:demo", "--prompt=a", "--output=s3://b/x"]),
    "evaluate": ("evaluate", ["--checkpoint=c", "--data=s3://b/data", "--output=o"]),
    "train": (
        "train",
        ["--config=configs/base_64.py:tiny", "--config.data.path=d", "--workdir=s3://b/run"],
    ),
    "prepare_data": (
        "prepare_data",
        ["--source=emoji", "--encoder=t5_tiny", "--output=s3://data", "--dry_run"],
    ),
    "train on": (
        "train",
        ["--config=configs/base_64.py:tiny", "--config.data.path=s3://b/d", "--workdir=w"],
    ),
}


@pytest.mark.parametrize("case", URLS)
def test_commands_refuse_urls(case, tmp_path):
    """Catches a result written into the local directory ./gs: and reported as a success."""
    command, options = URLS[case]
    (tmp_path / "configs").symlink_to(ROOT / "configs")
    done = subprocess.run(
        [sys.executable, "-m", f"imagen_jax.{command}", *options],
        cwd=tmp_path,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
    )
    (line,) = tiny.said(done.stderr)
    assert done.returncode == 2, done.stderr
    assert "is a URL, only local paths work" in line or "has the scheme s3://" in line, done.stderr
    assert [path.name for path in tmp_path.iterdir()] == ["configs"]


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("1 / 0", "division by zero"),
        ("nope", "name 'nope' is not defined"),
        ("[][1]", "list index out of range"),
        ('1 + "a"', "unsupported operand"),
    ],
)
def test_an_error_in_a_config_names_its_line(tmp_path, capsys, line, message):
    """Catches "division by zero" without a file, and a traceback for a misspelt name."""
    config = tmp_path / "config.py"
    config.write_text(f"def get_config():\n    return {line}\n")
    values = flags.FlagValues()
    config_flags.DEFINE_config_file("config", flag_values=values)
    with pytest.raises(cli.FLAG_ERRORS) as caught:
        values(["train", f"--config={config}"])
    text = cli.cause(caught.value)
    assert message in text and text.endswith(f"({config}, line 2)")
