"""Processes, usually one a host, that share a work directory: their shares and their liveness.

They communicate through small files in that directory: each process writes one every few seconds.
Process 0 leads. It reads the files of all others and passes failures on; the others read only its
file. Nothing else connects them, so no process waits for another within a pass, and no library ends
a process because another one died.
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

from imagen_jax.storage import try_lock

BEAT_S = 2.0  # between two heartbeats
SILENT_S = 60.0  # a process without a heartbeat for this long counts as dead
POLL_S = 0.1
AGAIN = "start all processes again, the same command continues"


class Lost(ValueError):
    """Another process failed or stopped sending heartbeats."""


class Crew:
    """Process `index` of `count` that work in `directory`.

    A crew of one writes no file and starts no thread. As a context manager it sends heartbeats, and
    reports an exception that leaves it to the others.

    run: a word shared by all processes of this start, and by those of no other start.
    hosts: their names, by index.
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
        self._state, self._message, self._fault = "here", "", ""
        watched = range(1, count) if index == 0 else [0] if index else []
        self._last: dict[int, Mapping[str, Any]] = {other: {} for other in watched}
        self._heard: dict[int, float] = {}
        self._stop, self._lock, self._number = threading.Event(), threading.Lock(), 0

    @property
    def leads(self) -> bool:
        """Whether this is process 0, which decides and publishes the result."""
        return self.index == 0

    def mine(self, tasks: Sequence[Any]) -> list[Any]:
        """This process's share: every `count`-th task, whatever the others have done."""
        return list(tasks[self.index :: self.count])

    def __enter__(self) -> "Crew":
        if self.count > 1:
            self._directory.mkdir(parents=True, exist_ok=True)
            self._heard = dict.fromkeys(self._last, time.monotonic())
            self._beat()
            threading.Thread(target=self._keep_beating, daemon=True).start()
        return self

    def __exit__(self, kind, error, traceback) -> None:
        self._stop.set()
        with contextlib.suppress(OSError):  # the directory is removed at the end
            if error:
                cause = " ".join(str(error).split()) or kind.__name__
                self.say(
                    "failed", self._fault or f"{self._name(self.index)} stopped: {cause}; {AGAIN}"
                )
            else:
                self.say("done")

    def say(self, state: str, message: str = "") -> None:
        """Tells the others a state: "here", "go" (from the leader: begin), "done" or "failed".

        message: of a failure, the error line with which the others end.
        """
        self._state, self._message = state, message
        if self.count > 1:
            self._beat()

    def check(self) -> None:
        """Raises Lost if another process failed or stopped sending heartbeats."""
        if self._fault:
            raise Lost(self._fault)

    def wait(self, ready: Callable[[], bool]) -> None:
        """Waits until `ready()`; raises Lost as soon as another process fails."""
        while not ready():
            self.check()
            if self.count == 1:
                raise ValueError(f"finished work was removed from the work directory; {AGAIN}")
            time.sleep(POLL_S)

    def wait_for_leader(self, *states: str) -> str:
        """Waits until process 0 says one of these states; returns it."""
        self.wait(lambda: self._last[0].get("state") in states)
        return self._last[0]["state"]

    def dismiss(self) -> None:
        """Called by the leader: tells all that the result is published.

        Waits until they confirm it, at most SILENT_S.
        """
        self.say("done")
        end = time.monotonic() + SILENT_S
        while (
            any(last.get("state") != "done" for last in self._last.values())
            and time.monotonic() < end
        ):
            time.sleep(POLL_S)
        self._stop.set()

    @contextlib.contextmanager
    def at_work(self) -> Iterator[None]:
        """Holds a lock that all followers share.

        By it the leader of a later start waits for them, see `wait_for_stragglers`.
        """
        with open(
            self._directory / "lock", "a+"
        ) as file:  # NFS needs read access for a shared lock
            fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
            yield

    def _name(self, index: int) -> str:
        return f"process {index}" + (f" ({self._hosts[index]})" if index < len(self._hosts) else "")

    def _keep_beating(self) -> None:
        while not self._stop.wait(BEAT_S):
            with contextlib.suppress(
                OSError
            ):  # the shared directory may not answer for a moment, or is removed at the end
                self._beat()
                self._listen()

    def _beat(self) -> None:
        with self._lock:
            self._number += 1
            content = {
                "run": self._run,
                "host": socket.gethostname(),
                "number": self._number,
                "state": self._state,
                "message": self._message,
            }
            new = self._directory / f"{self.index}.new"
            new.write_text(json.dumps(content))
            os.replace(new, self._directory / f"{self.index}.json")

    def _listen(self) -> None:
        for other, last in self._last.items():
            message = self._read(other)
            if message and message != last:
                self._last[other], self._heard[other] = message, time.monotonic()
            if self._fault or self._last[other].get("state") == "done":
                continue
            if self._last[other].get("state") == "failed":
                self._fault = self._last[other]["message"]
            elif time.monotonic() - self._heard[other] > SILENT_S:
                self._fault = (
                    f"{self._name(other)} has not been heard of for {SILENT_S:g} s: it died, or"
                    f" has no access to {self._directory.parent}; {AGAIN}"
                )
        if self._fault and self.leads:
            self.say("failed", self._fault)

    def _read(self, other: int) -> Mapping[str, Any]:
        """The last message of another process of this start; {} before the first."""
        try:
            message = json.loads((self._directory / f"{other}.json").read_text())
        except (OSError, ValueError):
            return {}
        return message if message["run"] == self._run else {}


def wait_for_stragglers(directory: Path) -> None:
    """Waits until no process of an earlier start works here. Called by the leader before "go".

    Raises:
      ValueError: one still works after SILENT_S.
    """
    if not (directory / "lock").exists():
        return
    end = time.monotonic() + SILENT_S + BEAT_S
    with open(directory / "lock", "a+") as file:
        while not try_lock(file, fcntl.LOCK_EX):
            if time.monotonic() > end:
                raise ValueError(
                    f"processes of an earlier start still work in {directory.parent}: end them"
                    " first"
                )
            time.sleep(POLL_S)


ALONE = Crew()
