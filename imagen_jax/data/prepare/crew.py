"""A group of processes that share a work directory: division of work and failure detection.

There is usually one process per host. Every few seconds each process writes a small heartbeat file
to that directory. Process 0 is the leader: it reads all heartbeats and reports failures in its own.
The other processes read only that one. There is no other communication. Within a pass no process
waits for another, and no library kills a process when another one dies.
"""

import contextlib
import fcntl
import json
import os
import socket
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from imagen_jax.exit_codes import ProcessLost
from imagen_jax.storage import try_lock

BEAT_S = 2.0  # between two heartbeats
SILENT_S = 60.0  # after this long without a heartbeat a process counts as dead
POLL_S = 0.1
AGAIN = "start all processes again with the same command; the work continues"


class Crew:
    """Process `index` of a group of `count` processes that work in `directory`.

    As a context manager it sends heartbeats, and tells the others if an exception leaves the block.
    A group of one writes no file and starts no thread.

    run: random id of this start, the same in all of its processes.
    hosts: the name of each process's host.
    """

    def __init__(
        self,
        directory: Path | None = None,
        index: int = 0,
        count: int = 1,
        run: str = "",
        hosts: Sequence[str] = (),
    ):
        self.index, self.count = index, count
        self._directory, self._run, self._hosts = directory, run, hosts
        self._state, self._message, self._failure = "here", "", ""
        watched = range(1, count) if index == 0 else [0]
        self._last_messages: dict[int, Mapping[str, Any]] = {other: {} for other in watched}
        self._last_seen: dict[int, float] = {}
        self._stop, self._lock, self._beat_number = threading.Event(), threading.Lock(), 0

    @property
    def leads(self) -> bool:
        """Whether this is process 0, the leader, which publishes the result."""
        return self.index == 0

    def mine(self, tasks: Sequence[Any]) -> list[Any]:
        """The tasks of this process: every `count`-th one, independent of progress."""
        return list(tasks[self.index :: self.count])

    def __enter__(self) -> "Crew":
        if self.count > 1:
            self._directory.mkdir(parents=True, exist_ok=True)
            self._last_seen = dict.fromkeys(self._last_messages, time.monotonic())
            self._beat()
            threading.Thread(target=self._keep_beating, daemon=True).start()
        return self

    def __exit__(self, kind, error, traceback) -> None:
        self._stop.set()
        # The directory may already be removed.
        with contextlib.suppress(OSError):
            if error:
                cause = " ".join(str(error).split()) or kind.__name__
                self.say(
                    "failed", self._failure or f"{self._name(self.index)} stopped: {cause}; {AGAIN}"
                )
            else:
                self.say("done")

    def say(self, state: str, message: str = "") -> None:
        """Publishes the state of this process: "here", "go", "done" or "failed".

        With "go" the leader tells the others to begin.

        message: for "failed", the error line that the other processes print.
        """
        self._state, self._message = state, message
        if self.count > 1:
            self._beat()

    def check(self) -> None:
        """Raises ProcessLost if another process failed or stopped sending heartbeats."""
        if self._failure:
            raise ProcessLost(self._failure)

    def wait(self, ready: Callable[[], bool]) -> None:
        """Waits until `ready()`; raises ProcessLost as soon as another process fails.

        A single process does not wait: if `ready()` is false, finished work was deleted, and it
        raises ValueError.
        """
        while not ready():
            self.check()
            if self.count == 1:
                raise ValueError(f"finished shards were deleted from the work directory; {AGAIN}")
            time.sleep(POLL_S)

    def wait_for_leader(self, *states: str) -> str:
        """Waits until process 0 publishes one of these states; returns the state."""
        self.wait(lambda: self._last_messages[0].get("state") in states)
        return self._last_messages[0]["state"]

    def dismiss(self) -> None:
        """Leader only: announces that the result is published.

        Waits up to SILENT_S for the other processes to confirm it.
        """
        self.say("done")
        deadline = time.monotonic() + SILENT_S
        while (
            any(last.get("state") != "done" for last in self._last_messages.values())
            and time.monotonic() < deadline
        ):
            time.sleep(POLL_S)
        self._stop.set()

    @contextlib.contextmanager
    def at_work(self) -> Iterator[None]:
        """Holds a shared lock while this follower works.

        The leader of a later start waits until it is released (`wait_for_stragglers`).
        """
        # "a+", because NFS needs read access for a shared lock.
        with open(self._directory / "lock", "a+") as file:
            fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
            yield

    def _name(self, index: int) -> str:
        return f"process {index}" + (f" ({self._hosts[index]})" if index < len(self._hosts) else "")

    def _keep_beating(self) -> None:
        while not self._stop.wait(BEAT_S):
            # The shared file system may be unavailable briefly, or the directory already removed.
            with contextlib.suppress(OSError):
                self._beat()
                self._listen()

    def _beat(self) -> None:
        with self._lock:
            self._beat_number += 1
            content = {
                "run": self._run,
                "host": socket.gethostname(),
                "number": self._beat_number,
                "state": self._state,
                "message": self._message,
            }
            new = self._directory / f"{self.index}.new"
            new.write_text(json.dumps(content))
            os.replace(new, self._directory / f"{self.index}.json")

    def _listen(self) -> None:
        for other, last in self._last_messages.items():
            message = self._read(other)
            if message and message != last:
                self._last_messages[other], self._last_seen[other] = message, time.monotonic()
            if self._failure or self._last_messages[other].get("state") == "done":
                continue
            if self._last_messages[other].get("state") == "failed":
                self._failure = str(self._last_messages[other].get("message", AGAIN))
            elif time.monotonic() - self._last_seen[other] > SILENT_S:
                self._failure = (
                    f"{self._name(other)} sent no heartbeat for {SILENT_S:g} s: it died, or cannot"
                    f" access {self._directory.parent}; {AGAIN}"
                )
        if self._failure and self.leads:
            self.say("failed", self._failure)

    def _read(self, other: int) -> Mapping[str, Any]:
        """The latest heartbeat of another process of this start; {} if there is none."""
        try:
            message = json.loads((self._directory / f"{other}.json").read_text())
        except (OSError, ValueError):
            return {}
        return message if isinstance(message, dict) and message.get("run") == self._run else {}


def wait_for_stragglers(directory: Path) -> None:
    """Leader only, before "go": waits until no follower of an earlier start is still working.

    Raises:
      ValueError: one still works after SILENT_S.
    """
    if not (directory / "lock").exists():
        return
    deadline = time.monotonic() + SILENT_S + BEAT_S
    with open(directory / "lock", "a+") as file:
        while not try_lock(file, fcntl.LOCK_EX):
            if time.monotonic() > deadline:
                raise ValueError(
                    f"processes of an earlier start still work in {directory.parent}: stop"
                    " them first"
                )
            time.sleep(POLL_S)


ALONE = Crew()
