"""Errors of JAX's runtime that mean that a device has failed, not the program.

A step that has compiled and then fails with DATA_LOSS or INTERNAL has met a faulty device, memory
or link. The statuses are those of absl; the words are from the runtimes of TPUs and CUDA.
"""

import contextlib
import re
from collections.abc import Callable, Iterator

from imagen_jax.exit_codes import DeviceFailed, runtime_status

FAULTS = ("DATA_LOSS", "INTERNAL")
# The device of this process has failed. INTERNAL alone is also the error of a collective operation
# after another process has gone.
CERTAIN = re.compile(
    r"^DATA_LOSS\b|device failed|halted|uncorrectable|CUDA_ERROR_(?!OUT_OF_MEMORY)", re.IGNORECASE
)
LONGEST = 400  # characters of the runtime's message that are kept


def is_certain(error: BaseException | None) -> bool:
    """Whether an error, or the one that it was raised from, names a fault of an own device."""
    if isinstance(error, DeviceFailed):
        error = error.__cause__
    status = runtime_status(error)
    return bool(status) and status != "RESOURCE_EXHAUSTED" and bool(CERTAIN.search(str(error)))


def is_fault(error: BaseException) -> bool:
    """Whether an error during a step, which has compiled before, is that of a device."""
    text = str(error).lower().replace("_", " ")
    possible = runtime_status(error) in FAULTS and "out of memory" not in text
    return possible or is_certain(error)


@contextlib.contextmanager
def named(step: Callable[[], int]) -> Iterator[None]:
    """Raises DeviceFailed in place of errors for which `is_fault` holds.

    step: the number of completed steps, for the message.
    """
    try:
        yield
    except Exception as error:
        if not is_fault(error):
            raise
        text = " ".join(str(error).split())[:LONGEST]
        raise DeviceFailed(
            f"a device failed after step {step()}: {text}; restart from the newest checkpoint, and"
            " without this host if that happens again"
        ) from error
