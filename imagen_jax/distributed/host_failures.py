"""The failures of hosts during a run, in its workdir.

Every failure that a retry may cure is one file, workdir/failures/ATTEMPT-PROCESS.json. The process
that fails writes it; for one that is lost, the others do. A host that fails again is named at the
next start, by `launch.status` and by the launcher.
"""

import dataclasses
import logging
import socket
import threading
import time
from collections.abc import Iterable, Sequence

from imagen_jax import exit_codes
from imagen_jax.object_storage import AnyPath
from imagen_jax.storage import entry_names, read_object, write_json

FOLDER = "failures"
ADVISED = 2  # failures of one host after which its removal is advised
WRITE_S = 10.0  # a process that ends does not wait longer for a bucket
FIELDS = {"time": float, "host": str, "process": int, "code": int, "reason": str}
log = logging.getLogger(__name__)


@dataclasses.dataclass(frozen=True)
class Failure:
    """One failure.

    time: in seconds since 1970. host, process: which failed. code: its exit code, negative for a
    signal. reason: the error.
    """

    time: float
    host: str
    process: int
    code: int
    reason: str


class HostFailures:
    """Writes the failures of one attempt at a run."""

    def __init__(self, workdir: AnyPath, attempt: str):
        """attempt: equal in all processes; they write the same file for the same failure."""
        self._folder, self._attempt = workdir / FOLDER, attempt

    def record(self, process: int, host: str, code: int, reason: str) -> None:
        """Writes a failure; logs an error of the file system.

        Ignores failures that no retry can cure.
        """
        if code in (0, *exit_codes.FINAL, exit_codes.INTERRUPTED):
            return
        failure = Failure(time.time(), host, process, code, reason)
        path = self._folder / f"{self._attempt}-{process}.json"

        def write() -> None:
            try:
                write_json(path, dataclasses.asdict(failure))
            except OSError as error:
                log.warning("the failure of %s was not recorded: %s", host, error)

        writing = threading.Thread(target=write, daemon=True)
        writing.start()
        writing.join(WRITE_S)

    def record_own(self, error: BaseException) -> None:
        """Writes the failure of a run of one process."""
        code, reason = exit_codes.of(error), " ".join(str(error).split()) or type(error).__name__
        self.record(0, socket.gethostname(), code, reason[:500])


def read(workdir: AnyPath) -> list[Failure]:
    """All failures of a run, oldest first. A damaged file is logged and left out."""
    found = []
    names = entry_names(workdir / FOLDER)
    for name in (name for name in names if name.endswith(".json")):  # not one that a kill cut off
        try:
            found.append(Failure(**read_object(workdir / FOLDER / name, FIELDS)))
        except (OSError, ValueError, TypeError) as error:
            log.warning("%s", error)
    return sorted(found, key=lambda failure: failure.time)


def summary(failures: Iterable[Failure]) -> list[str]:
    """One line for each host that failed; advises the removal of one with ADVISED failures."""
    return [_line(host, own) for host, own in _by_host(failures).items()]


def advice(failures: Iterable[Failure]) -> list[str]:
    """The lines of `summary` that advise a removal."""
    hosts = _by_host(failures).items()
    return [_line(host, own) for host, own in hosts if len(own) >= ADVISED]


def _by_host(failures: Iterable[Failure]) -> dict[str, list[Failure]]:
    """The failures of each host, in the order of its first one."""
    by_host: dict[str, list[Failure]] = {}
    for failure in failures:
        by_host.setdefault(failure.host, []).append(failure)
    return by_host


def _line(host: str, failures: Sequence[Failure]) -> str:
    last, count = failures[-1], len(failures)
    when = time.strftime("%Y-%m-%d %H:%M UTC", time.gmtime(last.time))
    reason = " ".join(last.reason.split())[:200]
    often = f"{count} times in this run, last" if count > 1 else "once in this run,"
    line = f"host {host} failed {often} at {when} with exit code {last.code} ({reason})"
    return line + ": remove it from the job" * (count >= ADVISED)
