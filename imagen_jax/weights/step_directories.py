"""The step directories of a run: the newest intact one, marks of readers, and retention.

A reader marks the step that it reads, so that the trainer of the run, in another process or on
another machine, does not delete it:

    workdir/checkpoints/1200.reading.HOST.PID.TOKEN

The reader holds a lock on this file and renews its time. A mark counts while its lock is held. Some
network file systems do not share locks between machines: there, a mark of another host also counts
until EXPIRY_S after it was last renewed. So a killed reader does not keep a checkpoint for ever.
"""

import contextlib
import fcntl
import logging
import os
import re
import shutil
import socket
import threading
import time
from collections.abc import Callable, Collection, Iterator
from pathlib import Path

from imagen_jax.checksums import find_damage
from imagen_jax.locks import LOCK_ATTEMPTS, try_lock
from imagen_jax.weights.leaves import CheckpointError

RENEW_S = 20.0
EXPIRY_S = 300.0
MARK = re.compile(r"(0|[1-9]\d*)\.reading\.(.+)\.\d+\.[0-9a-f]+")
log = logging.getLogger("imagen_jax.weights.checkpoint")


def steps(directory: Path) -> list[int]:
    """The steps that have a directory, oldest first."""
    if not directory.is_dir():
        return []
    return sorted(
        int(p.name)
        for p in directory.iterdir()
        if re.fullmatch(r"0|[1-9]\d*", p.name) and p.is_dir()
    )


def newest_intact(
    directory: Path,
    on_damaged: Callable[[int], None] = lambda step: None,
    find_fault: Callable[[Path], str | None] | None = None,
) -> int | None:
    """The newest intact step in a checkpoints directory, None if it has no steps.

    find_fault: by default `find_damage`.

    Logs each damaged step and passes it to `on_damaged`. Skips a step that a running trainer
    deletes during the check. Raises CheckpointError if all steps are damaged.
    """
    newest_fault = None
    for step in reversed(steps(directory)):
        reason = (find_fault or find_damage)(directory / str(step))
        if reason is None:
            return step
        if not (directory / str(step)).exists():
            continue
        log.warning("CHECKPOINT REJECTED: %s is not used, %s", directory / str(step), reason)
        on_damaged(step)
        newest_fault = newest_fault or f"{step}: {reason}"
    if newest_fault:
        raise CheckpointError(
            f"no checkpoint in {directory} is intact ({newest_fault}); restore a copy, or start in"
            " another workdir"
        )
    return None


def keep_aside(directory: Path, reason: str) -> None:
    """Renames a damaged step directory that a save needs to replace."""
    aside, n = directory.with_name(f"{directory.name}.damaged"), 1
    while aside.exists():
        n += 1
        aside = directory.with_name(f"{directory.name}.damaged_{n}")
    log.warning(
        "CHECKPOINT REJECTED: %s is damaged and blocks the save, %s; kept as %s",
        directory,
        reason,
        aside.name,
    )
    os.rename(directory, aside)


@contextlib.contextmanager
def marked(directory: Path, renew_s: float = RENEW_S) -> Iterator[None]:
    """Marks a step directory as read while the context lasts.

    A directory that this process must not write to is read without a mark.
    """
    token = os.urandom(4).hex()
    name = f"{directory.name}.reading.{socket.gethostname()}.{os.getpid()}.{token}"
    mark = directory.with_name(name)
    with contextlib.ExitStack() as stack:
        try:
            with _exclusive(directory.parent, wait=True):
                file = stack.enter_context(open(mark, "w"))
                stack.callback(mark.unlink, missing_ok=True)
                with contextlib.suppress(OSError):  # a file system without locks
                    try_lock(file, fcntl.LOCK_EX)
            ended = threading.Event()
            renewal = threading.Thread(target=_renew, args=(mark, ended, renew_s), daemon=True)
            renewal.start()
            stack.callback(renewal.join)
            stack.callback(ended.set)
        except OSError as error:
            log.info("%s is read without a mark for its trainer: %s", directory, error)
        yield


@contextlib.contextmanager
def marked_newest(directory: Path) -> Iterator[int | None]:
    """The result of `newest_intact`, marked as read from before its verification on."""
    with contextlib.ExitStack() as stack:

        def find_fault(candidate: Path) -> str | None:
            with contextlib.ExitStack() as reading:
                reading.enter_context(marked(candidate))
                reason = find_damage(candidate)
                if reason is None:
                    stack.push(reading.pop_all())
                return reason

        yield newest_intact(directory, find_fault=find_fault)


def _renew(mark: Path, ended: threading.Event, renew_s: float) -> None:
    """Sets the time of a mark again and again until `ended`."""
    while not ended.wait(renew_s):
        with contextlib.suppress(OSError):  # the file system may answer the next time
            os.utime(mark)


def is_read(directory: Path) -> bool:
    """Whether a reader has marked a step directory. Removes marks that no longer count."""
    found = False
    for mark in directory.parent.glob(f"{directory.name}.reading.*"):
        with contextlib.suppress(FileNotFoundError):  # the reader has just ended
            if _counts(mark):
                found = True
            else:
                mark.unlink()
    return found


def _counts(mark: Path) -> bool:
    with open(mark) as file:
        if not _free(file):
            return True
    match = MARK.fullmatch(mark.name)
    if match is None or match[2] == socket.gethostname():
        return False
    # The file server's clock, not those of two machines: the time of a file written now.
    probe = mark.with_name(f".now.{os.getpid()}")
    probe.touch()
    now = probe.stat().st_mtime
    probe.unlink()
    return now - mark.stat().st_mtime < EXPIRY_S


def _free(file: object) -> bool:
    """Whether no process holds the lock of a mark, as far as this machine can see."""
    try:
        return try_lock(file, fcntl.LOCK_SH)
    except OSError:  # a file system without locks
        return True


@contextlib.contextmanager
def _exclusive(directory: Path, wait: bool) -> Iterator[None]:
    """Keeps the readers that set a mark and the trainer that deletes apart.

    The lock is held for an instant. Without `wait`, raises BlockingIOError if it stays taken. A
    file system that cannot lock a directory does without it: there, a step may be deleted at the
    moment at which it is marked, which the reader reports.
    """
    descriptor = os.open(directory, os.O_RDONLY)
    try:
        for attempt in range(LOCK_ATTEMPTS):
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
                break
            except BlockingIOError:
                if attempt == LOCK_ATTEMPTS - 1:
                    raise
                time.sleep(0.02)
            except OSError:
                break
        yield
    finally:
        os.close(descriptor)


def delete_old(directory: Path, newest: int, keep: int, damaged: Collection[int]) -> None:
    """Deletes old steps, so that `keep` intact steps up to `newest` remain.

    Damaged steps are neither counted nor deleted. A step that is being read stays until a later
    call. Errors are logged.
    """
    older = [step for step in steps(directory) if step < newest and step not in damaged]
    for step in older[: max(0, len(older) - (keep - 1))]:
        target, deleting = directory / str(step), directory / f"{step}.deleting"
        try:
            with _exclusive(directory, wait=False):
                if is_read(target):
                    log.info("old checkpoint %s is being read and stays for now", target)
                    continue
                os.rename(target, deleting)
            shutil.rmtree(deleting)
        except OSError as error:
            log.warning("old checkpoint %s could not be deleted: %s", target, error)
