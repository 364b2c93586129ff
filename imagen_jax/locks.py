"""Locks of directories: one process at a time writes to the output of a command."""

import contextlib
import fcntl
import json
import logging
import os
import shutil
import socket
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from etils import epath

from imagen_jax import exit_codes
from imagen_jax.object_storage import AnyPath, bucket_errors, in_bucket, key_value_store

LOCK = "lock"
# Attempts to take a lock. `is_locked` holds it for an instant, so one failure proves nothing.
LOCK_ATTEMPTS = 10
RENEW_S = 10.0  # after which the holder of a lock in a bucket renews it
EXPIRY_S = 60.0  # without a renewal, after which another process takes it over
log = logging.getLogger(__name__)


@contextlib.contextmanager
def only_process(directory: AnyPath, doing: str) -> Iterator[None]:
    """Creates `directory` and locks it for this process. The lock ends with the process.

    In a bucket, the lock of a killed process ends after EXPIRY_S seconds, or at once for a process
    of the same machine.

    doing: completes "another process is ... DIRECTORY". Raises ValueError if another process holds
    the lock.
    """
    if in_bucket(directory):
        with BucketLock(directory, doing):
            yield
        return
    directory.mkdir(parents=True, exist_ok=True)
    with open(directory / LOCK, "w") as file:
        for _ in range(LOCK_ATTEMPTS):
            if try_lock(file, fcntl.LOCK_EX):
                break
            time.sleep(0.02)
        else:
            raise ValueError(f"another process is {doing} {directory}")
        yield


class Held(ValueError):
    """Another process holds a lock."""


class BucketLock:
    """The lock of a directory of a bucket: an object that its holder writes again and again.

    Every write is conditional on the generation that the holder knows, so two processes cannot both
    hold the lock. A holder that finds it taken over, because it was suspended or cut off for more
    than EXPIRY_S seconds, ends at once: it must not write any more.

    doing: as for `only_process`. name: of the object.
    """

    def __init__(
        self,
        directory: epath.Path,
        doing: str,
        renew_s: float = RENEW_S,
        expiry_s: float = EXPIRY_S,
        name: str = LOCK,
    ):
        self._directory, self._doing, self._name = directory, doing, name
        self._renew_s, self._expiry_s = renew_s, expiry_s
        self._store = key_value_store(directory)
        self._me = {"host": socket.gethostname(), "pid": os.getpid(), "machine": _machine()}
        self._me["token"] = os.urandom(8).hex()
        self._beats, self._generation = 0, b""
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._renew, daemon=True, name="lock")

    def __enter__(self) -> "BucketLock":
        with bucket_errors(self._directory):
            self._take()
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        # TensorStore repeats requests for many minutes; after expiry_s the lock has expired anyway.
        self._ended.set()
        self._thread.join(self._expiry_s)
        try:
            with bucket_errors(self._directory):
                removal = self._store.write(self._name, None, if_equal=self._generation)
                removal.result(timeout=self._expiry_s)
        except OSError as error:
            log.warning("the lock of %s was not removed, it expires: %s", self._directory, error)

    def _take(self) -> None:
        """Takes the lock if it is free or expired. Raises Held if its holder renews it."""
        found = self._store.read(self._name).result()
        if found.state == "value" and not self._ended_here(found.value):
            log.info("%s; waiting until its lock expires", self._held(found.value))
            found = self._wait_for_expiry(found)
        if not self._write(found.stamp.generation):
            raise Held(self._held(self._store.read(self._name).result().value))

    def _wait_for_expiry(self, found: Any) -> Any:
        """Waits EXPIRY_S seconds, by this machine's clock, or until the lock is removed.

        found: the lock as read. Returns it as it is then.
        """
        end = time.monotonic() + self._expiry_s
        while time.monotonic() < end:
            time.sleep(min(1.0, self._renew_s / 4))
            now = self._store.read(self._name).result()
            if now.state == "missing":
                return now
            if now.stamp.generation != found.stamp.generation:
                raise Held(self._held(now.value))
        return found

    def _write(self, generation: bytes) -> bool:
        """Writes the lock if it still has this generation. False if it has not."""
        self._beats += 1
        content = json.dumps(self._me | {"doing": self._doing, "beats": self._beats}).encode()
        stamp = self._store.write(self._name, content, if_equal=generation).result()
        if not stamp.generation:
            # TensorStore may have repeated a write that succeeded, after its answer was lost.
            now = self._store.read(self._name).result()
            if now.value != content:
                return False
            stamp = now.stamp
        self._generation = stamp.generation
        return True

    def _renew(self) -> None:
        while not self._ended.wait(self._renew_s):
            try:
                with bucket_errors(self._directory):
                    if self._write(self._generation):
                        continue
            except OSError as error:
                log.warning("the lock of %s could not be renewed: %s", self._directory, error)
                continue
            if self._ended.is_set():  # a renewal that ends after the lock was given up
                return
            message = (
                "another process has taken over %s, after %.0f s without a renewal of its lock"
            )
            log.error(f"{message}: this process ends", self._directory, self._expiry_s)
            os._exit(exit_codes.LOST)

    def _held(self, content: bytes) -> str:
        holder = _holder(content)
        who = f"process {holder['pid']} on {holder['host']}" if holder else "another process"
        return f"{who} is {self._doing} {self._directory}"

    def _ended_here(self, content: bytes) -> bool:
        """Whether the holder was a process of this machine that has ended."""
        holder = _holder(content)
        return holder.get("machine") == self._me["machine"] and not _runs(holder["pid"])


def _holder(content: bytes) -> dict[str, Any]:
    """The holder in a lock of a bucket; {} if the lock is damaged."""
    try:
        holder = json.loads(content)
        return holder if isinstance(holder["pid"], int) and holder["host"] else {}
    except (ValueError, TypeError, KeyError):
        return {}


def _machine() -> str:
    """Names the processes whose numbers this process sees: a boot of a machine, or a container."""
    boot = Path("/proc/sys/kernel/random/boot_id").read_text(encoding="ascii").strip()
    return f"{boot} {os.readlink('/proc/self/ns/pid')}"


def _runs(pid: int) -> bool:
    """Whether a process of this machine runs."""
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return True


def is_locked(directory: AnyPath) -> bool:
    """Whether a process is inside `only_process(directory)`, as far as this machine can see.

    A network file system may not share locks between machines. A lock in a bucket counts until it
    expires.
    """
    if in_bucket(directory):
        try:
            with bucket_errors(directory):
                return time.time() - (directory / LOCK).stat().mtime < EXPIRY_S
        except FileNotFoundError:
            return False
    try:
        with open(directory / LOCK) as file:
            return not try_lock(file, fcntl.LOCK_SH)
    except (FileNotFoundError, NotADirectoryError):
        return False


@contextlib.contextmanager
def whole_directory(output: Path, doing: str) -> Iterator[Path]:
    """Yields a temporary directory, renamed to `output` at the end, or removed after an error.

    output: a directory that does not exist or is empty. doing: as for `only_process`, which rejects
    a second process with the same `output`.
    """
    partial = output.with_name(f".{output.name}.partial")
    with only_process(partial, doing):
        try:
            if output.is_dir() and any(output.iterdir()):  # since the caller looked
                raise ValueError(f"{output} is not empty: give another directory")
            work = partial / "content"
            shutil.rmtree(work, ignore_errors=True)  # left by a killed process
            work.mkdir()
            yield work
            os.rename(work, output)
        finally:
            shutil.rmtree(partial, ignore_errors=True)


def try_lock(file: Any, kind: int) -> bool:
    """Takes fcntl.LOCK_SH or LOCK_EX until `file` is closed. False if another process has it."""
    try:
        fcntl.flock(file, kind | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True
