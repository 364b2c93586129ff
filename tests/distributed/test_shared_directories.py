"""The check of a shared directory in two real processes, one of which sees other files."""

import json

import pytest

from tests import processes

pytestmark = [pytest.mark.slow, pytest.mark.timeout(180)]
# Process 1 sees another disk, a listing that is older than the files, or a file's first content.
PROGRAM = """
import json, pathlib, sys, time
from imagen_jax import locks
from imagen_jax.distributed import shared_files, startup

startup.start(60)
root, first = pathlib.Path(sys.argv[1]), startup.member().index == 0
real_list, real_content, results = shared_files._list, shared_files._content, {}

def check(name, directory, seconds):
    directory.mkdir(parents=True, exist_ok=True)
    began = time.monotonic()
    try:
        shared_files.check_shared(directory, seconds)
        results[name] = time.monotonic() - began
    except ValueError as error:
        results[name] = str(error)

if first:
    with locks.only_process(root / "shared", "testing"):
        check("shared", root / "shared", 30)
else:
    check("shared", root / "shared", 30)
check("apart", root / ("a" if first else "b"), 1)
if not first:
    shared_files._list = lambda path: {n for n in real_list(path) if not n.endswith("-0.tmp")}
check("listing", root / "shared", 1)
shared_files._list = real_list
if not first:
    shared_files._content = lambda path: real_content(path) and b"first"
check("content", root / "shared", 1)
(root / f"{startup.member().index}.json").write_text(json.dumps(results))
"""


def test_two_processes_that_see_different_files(tmp_path):
    """Catches a mount that is found unfit after hours of training, an error in one process alone,
    a start that waits on a healthy file system, and files that the check leaves.
    """
    running = processes.start(lambda _: ["-c", PROGRAM, str(tmp_path)], tmp_path / "log", 2, 2)
    processes.finish(running, tmp_path / "log")
    one, two = (json.loads((tmp_path / f"{i}.json").read_text()) for i in range(2))
    assert one["shared"] < 2 and two["shared"] < 2
    assert "a is another directory on process 1" in one["apart"]
    for name, message in (("listing", "does not see"), ("content", "reads old content of")):
        assert one[name] == two[name] and "shared does not show all processes" in one[name]
        assert f" {message} a file that process 0" in one[name]
    for name in ("shared", "a", "b"):
        left = {path.name for path in (tmp_path / name).iterdir()}
        assert left <= {"hosts.json", "lock"}
