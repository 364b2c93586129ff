"""Processes, usually on as many hosts, that share one work directory: which part of the work is
whose, and whether the others still live.

They talk through small files in that directory, one written by each process, every few seconds.
Process 0 leads: it reads everyone's, the others only its, and what it learns of one it passes on to
all. Nothing else binds them, so no process waits for another within a pass, and none is ended by a
library because another has gone.
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

BEAT_S = 2.0  # between two signs of life
SILENT_S = 60.0  # without one, after which a process counts as dead
POLL_S = 0.1
AGAIN = "start all processes again, the same command continues"


class Lost(ValueError):
    """Another process has failed or gone silent."""


class Crew:
    """This process's place, `index` of `count`, in a crew that works in `directory`; a crew of one
    writes no file and starts no thread.

    run: a word that all processes of this start have and those of no other. hosts: their names, by
    index. As a context manager it gives signs of life; an exception that leaves it is told to the
    others.
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
        """Whether this is process 0, which decides, and which publishes the result."""
        return self.index == 0

    def mine(self, tasks: Sequence[Any]) -> list[Any]:
        """This process's part: every `count`-th. It depends on nothing but the place, so no process
        has to know what another has done.
        """
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
        with contextlib.suppress(OSError):  # the directory goes when all is done
            if error:
                cause = " ".join(str(error).split()) or kind.__name__
                self.say(
                    "failed", self._fault or f"{self._name(self.index)} stopped: {cause}; {AGAIN}"
                )
            else:
                self.say("done")

    def say(self, state: str, message: str = "") -> None:
        """Tells the others: "here", "go" (by the leader: begin), "done" or "failed", with the line
        they are to end with.
        """
        self._state, self._message = state, message
        if self.count > 1:
            self._beat()

    def check(self) -> None:
        """Raises Lost if another process has failed or gone silent."""
        if self._fault:
            raise Lost(self._fault)

    def wait(self, ready: Callable[[], bool]) -> None:
        """Until `ready()`; raises Lost as soon as another process has failed."""
        while not ready():
            self.check()
            if self.count == 1:
                raise ValueError(f"finished work has gone from the work directory; {AGAIN}")
            time.sleep(POLL_S)

    def wait_for_leader(self, *states: str) -> str:
        """Until process 0 has said one of these; returns which."""
        self.wait(lambda: self._last[0].get("state") in states)
        return self._last[0]["state"]

    def dismiss(self) -> None:
        """By the leader: tells all that the result is published, and waits until they have heard it
        or have been silent for long.
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
        """Holds a lock that all but the leader share, so that the leader of a later start can wait
        for them (`wait_for_stragglers`).
        """
        with open(
            self._directory / "lock", "a+"
        ) as file:  # NFS wants it open for reading to share it
            fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
            yield

    def _name(self, index: int) -> str:
        return f"process {index}" + (f" ({self._hosts[index]})" if index < len(self._hosts) else "")

    def _keep_beating(self) -> None:
        while not self._stop.wait(BEAT_S):
            with contextlib.suppress(
                OSError
            ):  # the shared directory may be away for a moment, or removed when all is done
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
            said = self._read(other)
            if said and said != last:
                self._last[other], self._heard[other] = said, time.monotonic()
            if self._fault or self._last[other].get("state") == "done":
                continue
            if self._last[other].get("state") == "failed":
                self._fault = self._last[other]["message"]
            elif time.monotonic() - self._heard[other] > SILENT_S:
                self._fault = (
                    f"{self._name(other)} has not been heard of for {SILENT_S:g} s: it died, or"
                    f" does not see {self._directory.parent}; {AGAIN}"
                )
        if self._fault and self.leads:
            self.say("failed", self._fault)

    def _read(self, other: int) -> Mapping[str, Any]:
        """What another process of this start said last; {} for nothing yet."""
        try:
            said = json.loads((self._directory / f"{other}.json").read_text())
        except (OSError, ValueError):
            return {}
        return said if said["run"] == self._run else {}


def wait_for_stragglers(directory: Path) -> None:
    """By a leader, before its "go": until no process of an earlier start works here; ValueError if
    one still does after SILENT_S.
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
