"""Several processes prepare one directory: the bytes of one process, through any kill."""

import signal

import pytest

from imagen_jax.distributed.watch import LOST
from tests import processes
from tests.data.synthetic_source import is_complete, stored, tree

CAPTIONS = {"a colour ramp"} | {f"picture number {i}" for i in range(20)}


def start(folder, output, count, run, victim=None, kill_at=0):
    """Starts `count` processes; `victim` kills itself at a rename.

    Each logs the captions that it encodes to RUN.INDEX next to `output`.
    """

    def command(index):
        dies = str(kill_at if index == victim else 0)
        program = ["-m", "tests.data.synthetic_source", str(folder), str(output), "1", dies]
        return [*program, str(output.parent / f"{run}.{index}")]

    return processes.start(command, output, count, count)


def encoded(output, run) -> list[str]:
    return [line for log in output.parent.glob(f"{run}.?") for line in log.read_text().splitlines()]


@pytest.mark.parametrize("count", [2, pytest.param(4, marks=pytest.mark.slow)])
def test_processes_make_what_one_makes(folder, whole, tmp_path, count):
    """Catches joined processes that encode a caption twice or never, or change a byte."""
    output = tmp_path / "data"
    processes.finish(start(folder, output, count, "all"), output)
    assert tree(output) == tree(whole)
    texts = encoded(output, "all")
    assert len(texts) == len(CAPTIONS) and set(texts) == CAPTIONS
    # Three caption shards: with four processes one has none.
    assert len(list(tmp_path.glob("all.?"))) == min(count, 3)


@pytest.mark.slow
def test_killed_with_one_two_and_four_processes(folder, whole, tmp_path):
    """Catches a survivor that hangs, or whose exit code makes a launcher blame it.

    Also a half-written file under a final name, and finished shards encoded again or lost when the
    number of processes changes.
    """
    output, complete = tmp_path / "data", tree(whole)
    # Renames: in the checks, in a caption shard between its file and the journal, at the end.
    for count, victim, kill_at in ((2, 1, 3), (1, 0, 16), (4, 2, 1), (2, 0, 3)):
        started = start(folder, output, count, "killed", victim, kill_at)
        codes = [process.wait(timeout=120) for process in started]
        survivors = [code for index, code in enumerate(codes) if index != victim]
        assert codes[victim] == -signal.SIGKILL, processes.log_of(output, victim).read_text()
        assert survivors == [LOST] * (count - 1)
        for index in set(range(count)) - {victim}:
            last = processes.log_of(output, index).read_text().splitlines()[-1]
            assert last.startswith(f"error: lost process {victim} ("), last
        assert not is_complete(output) and stored(output).items() <= complete.items()
    processes.finish(start(folder, output, 1, "last"), output)
    assert tree(output) == complete


@pytest.mark.parametrize(
    ("flags", "named"),
    [
        (["--shard_size=8"], "shard_size"),
        pytest.param(["--encoder=t5_tiny"], "--images_only", marks=pytest.mark.slow),
    ],
)
def test_other_settings_in_one_process_are_refused(folder, tmp_path, flags, named):
    """Catches shards of two sizes in one directory, and processes that wait for different steps."""
    output = tmp_path / "data"
    common = ["-m", "imagen_jax.prepare_data", f"--source=folder:{folder}", f"--output={output}"]
    other = flags if named == "--images_only" else ["--images_only", *flags]
    started = processes.start(
        lambda index: [*common, *(other if index else ["--images_only"])], output, 2, 2
    )
    assert {process.wait(timeout=120) for process in started} == {2}
    for index in range(2):
        log = processes.log_of(output, index).read_text()
        assert "process 1 (" in log and "differs from process 0 (" in log
        last = log.splitlines()[-1]
        assert named in last and last.endswith("; start the same command everywhere")
    assert not output.exists()
