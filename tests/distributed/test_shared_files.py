"""Directories and files that processes share, with threads for processes, see conftest.py."""

import errno
import os
import time
from pathlib import Path

import pytest

from imagen_jax import locks
from imagen_jax.distributed import shared_files, startup


def test_directories_that_are_not_shared(together, tmp_path):
    """Catches: hosts that each write their part of a checkpoint to a disk of their own, and a file
    left by an earlier run taken for a sign that they share.
    """
    for index in range(together.count):
        (tmp_path / str(index)).mkdir()
        (tmp_path / str(index) / "hosts.json").write_text('{"start": "earlier"}')
    together(lambda index: shared_files.check_shared(tmp_path / "0", 5))

    def apart(index):
        with pytest.raises(
            ValueError,
            match=(
                r"is another directory on process 1 \(b\), process 2 \(c\) than on process 0 \(a\)"
            ),
        ):
            shared_files.check_shared(tmp_path / str(index), 0.5)

    together(apart)


def test_a_shared_directory_is_checked_at_once(together, tmp_path, caplog):
    """Catches files that the check leaves, one of a killed start that stays, and a check that
    waits although everything is visible.
    """
    (tmp_path / ".shared-0123-1.tmp").touch()
    os.utime(tmp_path / ".shared-0123-1.tmp", (0, 0))
    began = time.monotonic()
    with locks.only_process(tmp_path, "using"):
        together(lambda index: shared_files.check_shared(tmp_path, 20))
    assert time.monotonic() - began < 2 and not caplog.text
    assert {path.name for path in tmp_path.iterdir()} == {"hosts.json", "lock"}


def test_a_file_that_was_just_replaced_is_read_again(together, tmp_path, monkeypatch):
    """Catches a start that ends because NFS calls the earlier hosts.json stale."""
    read, stale = shared_files.read_object, [True]

    def once_stale(path, fields):
        if startup.member().index == 1 and stale:
            stale.pop()
            raise OSError(errno.ESTALE, "Stale file handle", str(path))
        return read(path, fields)

    monkeypatch.setattr(shared_files, "read_object", once_stale)
    together(lambda index: shared_files.check_shared(tmp_path, 20))
    assert not stale


def hiding(monkeypatch, process, listing=None, content=None):
    """Changes what one process sees of the file of process 0."""
    real_list, real_content = shared_files._list, shared_files._content
    own = lambda: startup.member().index == process

    def names(directory):
        found = real_list(directory)
        return listing(found) if listing and own() else found

    def read(path):
        found = real_content(path)
        return content(found) if content and own() and path.name.endswith("-0.tmp") else found

    monkeypatch.setattr(shared_files, "_list", names)
    monkeypatch.setattr(shared_files, "_content", read)


@pytest.mark.parametrize(
    "hidden, message",
    [
        (
            {"listing": lambda names: {name for name in names if not name.endswith("-0.tmp")}},
            "process 2 (c) does not see a file that process 0 (a) wrote 0.3 s before",
        ),
        ({"content": lambda _: b""}, "process 2 (c) does not see a file that process 0 (a) wrote"),
        (
            {"content": lambda found: b"first" if found else b""},
            "process 2 (c) reads old content of a file that process 0 (a) wrote 0.3 s before",
        ),
    ],
)
def test_a_mount_that_hides_files_is_found_at_the_start(
    together, tmp_path, monkeypatch, hidden, message
):
    """Catches a cache of listings, a file that is never visible, a rewritten file whose old content
    stays, an error in one process alone, and files left after the error.
    """
    hiding(monkeypatch, 2, **hidden)

    def start(index):
        with pytest.raises(ValueError) as error:
            shared_files.check_shared(tmp_path, 0.3)
        return str(error.value)

    texts = together(start)
    assert len(set(texts)) == 1 and texts[0].startswith(f"{tmp_path} does not show all processes")
    assert message in texts[0] and "process 1 (b)" not in texts[0] and "\n" not in texts[0]
    assert [path.name for path in tmp_path.iterdir()] == ["hosts.json"]


def test_a_file_that_is_visible_late_is_no_error(together, tmp_path, monkeypatch):
    """Catches a healthy network file system that is refused because its cache lives for seconds."""
    reads = []
    hiding(
        monkeypatch, 1, content=lambda found: reads.append(1) or (found if len(reads) > 3 else b"")
    )
    together(lambda index: shared_files.check_shared(tmp_path, 20))
    assert len(reads) > 3


def test_a_directory_that_one_process_cannot_write_to(together, tmp_path, monkeypatch):
    """Catches an error of one process, for which the others wait."""
    write = shared_files.write_atomically

    def refused(path, content):
        if startup.member().index == 1:
            raise OSError(errno.EROFS, "Read-only file system", str(path))
        write(path, content)

    def start(index):
        with pytest.raises(
            ValueError, match=r"process 1 \(b\) cannot write there \(Read-only file"
        ):
            shared_files.check_shared(tmp_path, 0.3)

    monkeypatch.setattr(shared_files, "write_atomically", refused)
    together(start)


def test_a_lock_that_does_not_reach_a_process_is_logged(together, tmp_path, monkeypatch, caplog):
    """Catches a second run on another host that nothing refuses, without a word about it."""
    monkeypatch.setattr(shared_files, "is_locked", lambda _: startup.member().index != 2)
    together(lambda index: shared_files.check_shared(tmp_path, 20))
    (record,) = caplog.records
    assert "does not reach process 2 (c): a second run" in record.getMessage()


def test_files_of_other_processes_are_awaited(together, tmp_path, monkeypatch):
    """Catches: a barrier alone, after which a file that the file system shows late is missing, and
    a file that is read before all of it is visible.
    """
    seen = {}

    def size(path):
        seen[path] = seen.get(path, 0) + 1
        return [None, 1, 4][min(seen[path], 3) - 1]

    def write(index):
        (tmp_path / str(index)).write_bytes(b"four")
        shared_files.share_files([tmp_path / str(index)])
        return [seen[str(tmp_path / str(other))] for other in range(together.count)]

    monkeypatch.setattr(shared_files, "_size", size)
    assert all(count >= 3 for counts in together(write) for count in counts)


def test_a_file_that_stays_invisible_is_an_error_in_all(together, tmp_path):
    """Catches: an error in one process, after which the others wait for it."""

    def start(index):
        path = tmp_path / ("missing" if index == 1 else ".")
        with pytest.raises(
            ValueError, match=r"not visible .*missing on process 1 \(b\); check the"
        ):
            shared_files.wait_for_files([path], 0.1)

    together(start)


def test_alone():
    """Catches: a process that waits for others where there are none."""
    shared_files.check_shared(Path("missing"))
    shared_files.wait_for_files([Path("missing")])
    shared_files.wait_to_see(Path("missing"))
