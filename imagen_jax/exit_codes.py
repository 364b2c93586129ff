"""Exit codes of the commands: what each one tells a launcher to do.

    0    finished, or stopped in order with everything saved
    1    transient or unexpected failure: retry
    2    invalid input or settings: do not retry
    3    the loss is not finite, or too many steps were skipped: do not retry, a person has to look
    4    a device failed, or replicas of the state differ: retry, on other hardware if possible
    75   another process of the run was lost or failed: restart all processes
    130  interrupted by the user

Codes above 128 that are not in this list come from a signal: 137 is SIGKILL, 134 is SIGABRT.
"""

import errno
import traceback

from imagen_jax.storage import is_away

FAILED, INVALID, NOT_FINITE, HARDWARE = 1, 2, 3, 4
LOST = 75  # EX_TEMPFAIL of sysexits.h
INTERRUPTED = 130
FINAL = (INVALID, NOT_FINITE)  # the same command would fail again


class HardwareFault(RuntimeError):
    """A device, its memory or a link computed or stored a wrong value. All processes raise it."""


class DeviceFailed(RuntimeError):
    """A device of this process failed during a step. The other processes wait for this one."""


class ProcessLost(RuntimeError):
    """Another process of the run failed or stopped sending heartbeats."""


class PipelineFailed(RuntimeError):
    """A worker of a data pipeline failed; the cause may be gone at a retry."""


# Errors that one line explains, see `is_expected`.
EXPECTED = (
    ValueError,
    OSError,
    FloatingPointError,
    ImportError,
    HardwareFault,
    DeviceFailed,
    ProcessLost,
    PipelineFailed,
)
FULL = (errno.ENOSPC, errno.EDQUOT)
# Packages whose ValueErrors are messages to the user. Those of other libraries are our mistakes.
OWN = ("imagen_jax", "configs", "launch", "tools", "tests", "absl", "ml_collections", "__main__")


def is_expected(error: BaseException) -> bool:
    """Whether one line explains an error. All others are printed with their traceback."""
    if not isinstance(error, EXPECTED):
        return False
    if not isinstance(error, ValueError) or error.__traceback__ is None:
        return True
    *_, (frame, _) = traceback.walk_tb(error.__traceback__)
    return frame.f_globals.get("__name__", "").split(".")[0] in OWN


def runtime_status(error: BaseException | None) -> str:
    """The status of an error of JAX's runtime, such as "INTERNAL"; "" for any other error."""
    if type(error).__name__ not in ("JaxRuntimeError", "XlaRuntimeError"):
        return ""
    return str(error).strip().partition(":")[0] or "UNKNOWN"


def of(error: BaseException) -> int:
    """The exit code of a process that ends with this error."""
    if runtime_status(error) == "RESOURCE_EXHAUSTED":
        return INVALID  # the same program needs as much memory again
    if isinstance(error, FloatingPointError):
        return NOT_FINITE
    if isinstance(error, (HardwareFault, DeviceFailed)):
        return HARDWARE
    if isinstance(error, ProcessLost):
        return LOST
    if isinstance(error, PipelineFailed):
        return FAILED
    return INVALID if is_expected(error) and not is_transient(error) else FAILED


def is_transient(error: BaseException | None) -> bool:
    """Whether an error, or one that it was raised from, may be gone at a retry."""
    while error is not None:
        if is_away(error) or (isinstance(error, OSError) and error.errno in FULL):
            return True
        error = error.__cause__
    return False
