"""What processes tell each other, with threads for processes and one dictionary for jax's store."""

import concurrent.futures
import errno
import os
import threading
import time
from pathlib import Path

import pytest

from imagen_jax import locks
from imagen_jax.distributed import agreement, startup

COUNT = 3


class Store(dict):
    """What is used of jax's client."""

    def __init__(self):
        self.barriers: dict[str, threading.Barrier] = {}
        self.lock = threading.Lock()

    def key_value_set(self, key, value):
        assert key not in self
        self[key] = value

    def key_value_dir_get(self, directory):
        return [(key, value) for key, value in sorted(self.items()) if key.startswith(directory)]

    def key_value_delete(self, directory):
        for key in [key for key in self if key.startswith(directory)]:
            del self[key]

    def wait_at_barrier(self, name, timeout_in_ms):
        with self.lock:
            barrier = self.barriers.setdefault(name, threading.Barrier(COUNT))
        barrier.wait(10)


class Rounds:
    """A count of its own for each thread, as each process has one."""

    def __init__(self):
        self.own = threading.local()

    def __next__(self):
        self.own.n = getattr(self.own, "n", -1) + 1
        return self.own.n


@pytest.fixture
def together(monkeypatch):
    """Runs a function of the process's number in three processes at once."""
    own, store = threading.local(), Store()
    monkeypatch.setattr(startup, "member", lambda: own.member)
    monkeypatch.setattr(startup, "hosts", lambda: ["a", "b", "c"])
    monkeypatch.setattr(startup, "store", lambda: store)
    monkeypatch.setattr(agreement, "_rounds", Rounds())

    def process(function, index):
        own.member = startup.Member("a:1", COUNT, index, "test")
        return function(index)

    def run(function):
        store.clear(), store.barriers.clear()  # new threads begin with round 0
        with concurrent.futures.ThreadPoolExecutor(COUNT) as pool:
            return [
                future.result()
                for future in [pool.submit(process, function, index) for index in range(COUNT)]
            ]

    run.store = store
    return run


def test_all_hear_what_all_say(together):
    """Catches: an answer of an earlier round, one read before all have spoken, keys that are kept
    for ever.
    """

    def talk(index):
        heard = []
        for n in range(20):
            time.sleep(0.002 * ((index + n) % COUNT))
            heard.append(agreement.gather(f"{index} in round {n}"))
        return heard

    for heard in together(talk):
        assert heard == [[f"{i} in round {n}" for i in range(COUNT)] for n in range(20)]
    assert len(together.store) <= 2 * COUNT


def test_unlike_processes_are_named_in_all(together):
    """Catches: an error in the odd process alone, after which the others wait for it, and one that
    does not say what differs.
    """

    def start(index):
        agreement.check({"config": "same", "data": "same"})
        with pytest.raises(
            ValueError,
            match=(
                r"^the processes were not started alike: process 2 \(c\) differs from process 0"
                r" \(a\) in: data; start the same command everywhere$"
            ),
        ):
            agreement.check({"config": "same", "data": "other" if index == 2 else "same"})

    together(start)


def test_facts_that_a_process_lacks_differ(together):
    """Catches: facts that are compared by their position, and a message with hundreds of them."""

    def start(index):
        facts = {f"base.{name}": name for name in "abcdefgh"}
        facts |= {"base.a": "other"} if index == 1 else {"x": ""}
        with pytest.raises(ValueError, match=r"process 1 .* in: base\.a, x; start") as error:
            agreement.check(facts)
        assert "process 2" not in str(error.value)

    def many(index):
        with pytest.raises(ValueError, match=r"process 2 \(c\) .* in: 0, 1, 2, 3, 4, \.\.\.;"):
            agreement.check({str(i): str(index // 2) for i in range(9)})

    together(start)
    together(many)


def test_directories_that_are_not_shared(together, tmp_path):
    """Catches: hosts that each write their part of a checkpoint to a disk of their own, and a file
    left by an earlier run taken for a sign that they share.
    """
    for index in range(COUNT):
        (tmp_path / str(index)).mkdir()
        (tmp_path / str(index) / "hosts.json").write_text('{"start": "earlier"}')
    together(lambda index: agreement.check_shared(tmp_path / "0", 5))

    def apart(index):
        with pytest.raises(
            ValueError,
            match=(
                r"is another directory on process 1 \(b\), process 2 \(c\) than on process 0 \(a\)"
            ),
        ):
            agreement.check_shared(tmp_path / str(index), 0.5)

    together(apart)


def test_a_shared_directory_is_checked_at_once(together, tmp_path, caplog):
    """Catches files that the check leaves, one of a killed start that stays, and a check that
    waits although everything is visible.
    """
    (tmp_path / ".shared-0123-1.tmp").touch()
    os.utime(tmp_path / ".shared-0123-1.tmp", (0, 0))
    began = time.monotonic()
    with locks.only_process(tmp_path, "using"):
        together(lambda index: agreement.check_shared(tmp_path, 20))
    assert time.monotonic() - began < 2 and not caplog.text
    assert {path.name for path in tmp_path.iterdir()} == {"hosts.json", "lock"}


def hiding(monkeypatch, process, listing=None, content=None):
    """Changes what one process sees of the file of process 0."""
    real_list, real_content = agreement._list, agreement._content
    own = lambda: startup.member().index == process

    def names(directory):
        found = real_list(directory)
        return listing(found) if listing and own() else found

    def read(path):
        found = real_content(path)
        return content(found) if content and own() and path.name.endswith("-0.tmp") else found

    monkeypatch.setattr(agreement, "_list", names)
    monkeypatch.setattr(agreement, "_content", read)


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
            agreement.check_shared(tmp_path, 0.3)
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
    together(lambda index: agreement.check_shared(tmp_path, 20))
    assert len(reads) > 3


def test_a_directory_that_one_process_cannot_write_to(together, tmp_path, monkeypatch):
    """Catches an error of one process, for which the others wait."""
    write = agreement.write_atomically

    def refused(path, content):
        if startup.member().index == 1:
            raise OSError(errno.EROFS, "Read-only file system", str(path))
        write(path, content)

    def start(index):
        with pytest.raises(
            ValueError, match=r"process 1 \(b\) cannot write there \(Read-only file"
        ):
            agreement.check_shared(tmp_path, 0.3)

    monkeypatch.setattr(agreement, "write_atomically", refused)
    together(start)


def test_a_lock_that_does_not_reach_a_process_is_logged(together, tmp_path, monkeypatch, caplog):
    """Catches a second run on another host that nothing refuses, without a word about it."""
    monkeypatch.setattr(agreement, "is_locked", lambda _: startup.member().index != 2)
    together(lambda index: agreement.check_shared(tmp_path, 20))
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
        agreement.share_files([tmp_path / str(index)])
        return [seen[str(tmp_path / str(other))] for other in range(COUNT)]

    monkeypatch.setattr(agreement, "_size", size)
    assert all(count >= 3 for counts in together(write) for count in counts)


def test_a_file_that_stays_invisible_is_an_error_in_all(together, tmp_path):
    """Catches: an error in one process, after which the others wait for it."""

    def start(index):
        path = tmp_path / ("missing" if index == 1 else ".")
        with pytest.raises(
            ValueError, match=r"not visible .*missing on process 1 \(b\); check the"
        ):
            agreement.wait_for_files([path], 0.1)

    together(start)


def test_alone():
    """Catches: a process that waits for others where there are none."""
    assert agreement.gather("x") == ["x"]
    agreement.check({"config": "any"})
    agreement.wait_for_files([Path("missing")])
