"""The step directories of a run: the newest intact one, marks, and retention.

A step is complete when its SHA256SUMS, written last and deleted first, exists. Files beside its
directory say what is being done with it:

    checkpoints/1200.writing                   a save that has not ended
    checkpoints/1200.deleting                  a deletion that has not ended
    checkpoints/1200.reading.HOST.PID.TOKEN    a reader, so that the trainer, in another process or
                                               on another machine, does not delete the step

A reader holds a lock on its mark and renews its time. A mark counts while its lock is held. Buckets
and some network file systems have no locks that machines share: there, a mark also counts until
EXPIRY_S after it was last renewed. So a killed reader does not keep a checkpoint for ever.
"""

import contextlib
import fcntl
import logging
import os
import re
import socket
import threading
import time
from collections.abc import Callable, Collection, Iterator, Sequence

from imagen_jax.checksums import CHECKSUMS, find_damage, is_sealed
from imagen_jax.locks import try_lock
from imagen_jax.object_storage import AnyPath, bucket_errors, in_bucket
from imagen_jax.storage import entry_names, exists, remove, temporary_name, write_atomically
from imagen_jax.weights.leaves import CheckpointError

RENEW_S = 20.0
EXPIRY_S = 300.0
DECISION_S = 10.0  # in which a trainer that deletes a step looks for readers
STEP = re.compile(r"0|[1-9]\d*")
# Older versions wrote and deleted directories of these names; the last ones are of orbax.
UNFINISHED = re.compile(r"(0|[1-9]\d*)\.(?:writing|deleting|orbax-checkpoint-tmp).*")
MARK = re.compile(r"(0|[1-9]\d*)\.reading\.(.+)\.(\d+)\.[0-9a-f]+")
log = logging.getLogger("imagen_jax.weights.checkpoint")


def steps(directory: AnyPath) -> list[int]:
    """The steps that have a directory, oldest first, without those being written or deleted."""
    names = entry_names(directory)
    numbers = {name for name in names if STEP.fullmatch(name)}
    begun = {m[1] for name in names if (m := UNFINISHED.fullmatch(name))} & numbers
    # A mark may have outlived what it announced.
    begun -= {name for name in begun if is_sealed(directory / name)}
    found = sorted(int(name) for name in numbers - begun)
    return found if in_bucket(directory) else [n for n in found if (directory / str(n)).is_dir()]


def split_name(path: AnyPath) -> tuple[AnyPath, str]:
    """(WORKDIR, STEP) of WORKDIR@STEP, where STEP may be "best"; (path, "") of another path."""
    match = re.fullmatch(r"(.+)@(0|[1-9]\d*|best)", path.name)
    if match is None or exists(path):
        return path, ""
    return path.with_name(match[1]), match[2]


def mark_path(directory: AnyPath, step: int, doing: str) -> AnyPath:
    """The file that announces the writing or deletion of a step; doing: "writing", "deleting"."""
    return directory / f"{step}.{doing}"


def remove_leftovers(directory: AnyPath) -> None:
    """Removes leftovers of killed processes: incomplete steps, marks, temporary directories.

    Call it only in the trainer that holds the run.
    """
    for name in entry_names(directory):
        if match := UNFINISHED.fullmatch(name):
            log.warning("removing %s, left by an interrupted run", directory / name)
            if not is_sealed(directory / match[1]):
                remove(directory / match[1])
            remove(directory / name)


def newest_intact(
    directory: AnyPath,
    on_damaged: Callable[[int], None] = lambda step: None,
    find_fault: Callable[[AnyPath], str | None] | None = None,
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
        if not exists(directory / str(step)) or step not in steps(directory):
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


def keep_aside(directory: AnyPath, reason: str) -> None:
    """Renames a damaged step directory that a save needs to replace."""
    aside, n = directory.with_name(f"{directory.name}.damaged"), 1
    while exists(aside):
        n += 1
        aside = directory.with_name(f"{directory.name}.damaged_{n}")
    log.warning(
        "CHECKPOINT REJECTED: %s is damaged and blocks the save, %s; kept as %s",
        directory,
        reason,
        aside.name,
    )
    with bucket_errors(directory):
        directory.rename(aside)


@contextlib.contextmanager
def marked(directory: AnyPath, renew_s: float = RENEW_S) -> Iterator[None]:
    """Marks a step directory as read while the context lasts.

    A directory that this process must not write to is read without a mark.
    """
    token = os.urandom(4).hex()
    name = f"{directory.name}.reading.{socket.gethostname()}.{os.getpid()}.{token}"
    mark = directory.with_name(name)
    with contextlib.ExitStack() as stack:
        try:
            stack.enter_context(_created(mark))
            ended = threading.Event()
            renewal = threading.Thread(
                target=_renew_until, args=(mark, ended, renew_s), daemon=True
            )
            renewal.start()
            stack.callback(renewal.join)
            stack.callback(ended.set)
        except OSError as error:
            log.info("%s is read without a mark for its trainer: %s", directory, error)
        _wait_for_deletion(directory)
        yield


@contextlib.contextmanager
def _created(mark: AnyPath) -> Iterator[None]:
    """Creates a mark, on a local file system with a lock, and removes it at the end."""
    with contextlib.ExitStack() as stack:
        if in_bucket(mark):
            _renew(mark)
        else:
            # The lock comes before the name: a mark without one does not count.
            unnamed = temporary_name(mark)
            file = stack.enter_context(open(unnamed, "w"))
            with contextlib.suppress(OSError):  # a file system without locks
                try_lock(file, fcntl.LOCK_EX)
            os.rename(unnamed, mark)
        stack.callback(_remove_mark, mark)
        yield


def _wait_for_deletion(directory: AnyPath) -> None:
    """Waits while the trainer decides whether it deletes a step that was marked meanwhile."""
    deleting = mark_path(directory.parent, int(directory.name), "deleting")
    end = time.monotonic() + DECISION_S
    while exists(deleting) and time.monotonic() < end:
        time.sleep(0.02)


@contextlib.contextmanager
def marked_newest(directory: AnyPath) -> Iterator[int | None]:
    """The result of `newest_intact`, marked as read from before its verification on."""
    with contextlib.ExitStack() as stack:

        def find_fault(candidate: AnyPath) -> str | None:
            with contextlib.ExitStack() as reading:
                reading.enter_context(marked(candidate))
                reason = find_damage(candidate)
                if reason is None:
                    stack.push(reading.pop_all())
                return reason

        yield newest_intact(directory, find_fault=find_fault)


def _renew(mark: AnyPath) -> None:
    """Sets the time of a file to now; creates it if it is missing."""
    if in_bucket(mark):
        write_atomically(mark, b"")
    else:
        mark.touch()


def _renew_until(mark: AnyPath, ended: threading.Event, renew_s: float) -> None:
    """Renews a mark again and again until `ended`."""
    while not ended.wait(renew_s):
        with contextlib.suppress(OSError):  # the file system may answer the next time
            _renew(mark)


def _remove_mark(mark: AnyPath) -> None:
    try:
        remove(mark)
    except OSError as error:
        log.info("%s was not removed, it expires: %s", mark, error)


def is_read(directory: AnyPath) -> bool:
    """Whether a reader has marked a step directory. Removes marks that no longer count."""
    found = False
    for name in entry_names(directory.parent):
        if name.startswith(f"{directory.name}.reading."):
            mark = directory.with_name(name)
            with contextlib.suppress(FileNotFoundError):  # the reader has just ended
                if _counts(mark):
                    found = True
                else:
                    remove(mark)
    return found


def _counts(mark: AnyPath) -> bool:
    if not in_bucket(mark):
        with open(mark) as file:
            if not _free(file):
                return True
        match = MARK.fullmatch(mark.name)
        if match is None or match[2] == socket.gethostname():
            return False
    # The clock of the file server, not those of two machines: the time of a file written now.
    probe = mark.with_name(f".now.{os.getpid()}")
    _renew(probe)
    try:
        return _changed(probe) - _changed(mark) < EXPIRY_S
    finally:
        remove(probe)


def _changed(path: AnyPath) -> float:
    """The time of a file's last change, in seconds, by the clock of its file server."""
    with bucket_errors(path):
        stat = path.stat()
    return stat.mtime if in_bucket(path) else stat.st_mtime


def _free(file: object) -> bool:
    """Whether no process holds the lock of a mark, as far as this machine can see."""
    try:
        return try_lock(file, fcntl.LOCK_SH)
    except OSError:  # a file system without locks
        return True


def delete_old(
    directory: AnyPath,
    newest: int,
    damaged: Collection[int],
    choose: Callable[[Sequence[int], AnyPath], list[int]],
) -> None:
    """Deletes the steps that `choose(intact steps, directory)` returns, except `newest`.

    Damaged steps are not deleted. A step that is being read stays until a later call. Errors are
    logged.
    """
    intact = [step for step in steps(directory) if step <= newest and step not in damaged]
    try:
        old = [step for step in choose(intact, directory) if step != newest]
    except (OSError, CheckpointError) as error:
        log.warning("no old checkpoint of %s is deleted: %s", directory, error)
        return
    for step in old:
        try:
            delete(directory, step)
        except OSError as error:
            log.warning("old checkpoint %s could not be deleted: %s", directory / str(step), error)


def delete(directory: AnyPath, step: int) -> None:
    """Deletes a step unless it is being read.

    The trainer announces the deletion and then looks for marks; a reader sets its mark and then
    looks for a deletion. So one of them sees the other.
    """
    target, deleting = directory / str(step), mark_path(directory, step, "deleting")
    write_atomically(deleting, b"")
    if is_read(target):
        log.info("old checkpoint %s is being read and stays for now", target)
    else:
        remove(target / CHECKSUMS)
        remove(target)
    remove(deleting)
