"""Exit codes of the verbs: what each one tells a launcher to do.

    0    finished, or stopped in order with everything saved
    1    transient or unexpected failure: retry
    2    invalid input or settings: do not retry
    3    the loss is not finite: do not retry, a person has to look
    4    replicas of the state differ, a hardware fault: retry, on other hardware if possible
    75   another process of the run was lost or failed: restart all processes
    130  interrupted by the user

Codes above 128 that are not in this list come from a signal: 137 is SIGKILL, 134 is SIGABRT.
"""

from imagen_jax.storage import is_away

FAILED, INVALID, NOT_FINITE, HARDWARE = 1, 2, 3, 4
LOST = 75  # EX_TEMPFAIL of sysexits.h
INTERRUPTED = 130
FINAL = (INVALID, NOT_FINITE)  # the same command would fail again


class HardwareFault(RuntimeError):
    """A device, its memory or a link computed or stored a wrong value."""


# Errors that one line explains. All others are printed with their traceback.
EXPECTED = (ValueError, OSError, FloatingPointError, HardwareFault)


def of(error: BaseException) -> int:
    """The exit code of a process that ends with this error."""
    if isinstance(error, FloatingPointError):
        return NOT_FINITE
    if isinstance(error, HardwareFault):
        return HARDWARE
    return INVALID if isinstance(error, EXPECTED) and not is_away(error) else FAILED
