"""What every verb's command line has in common: errors of the user's making end in one line, not in a traceback."""

import os
import sys
from typing import Callable

from absl import app


def run(main: Callable[[], int | None]) -> None:
    """Parses absl flags, calls `main` and exits with what it returns (None: 0).

    A ValueError, a missing file, a loss that is not finite or the like is printed as one line and exits with 2; IMAGEN_JAX_TRACEBACK=1 shows the traceback.
    """

    def guarded(argv):
        if len(argv) > 1:
            return fail(f"unexpected argument {argv[1]!r}; options start with --, see --help")
        try:
            return main() or 0
        except KeyboardInterrupt:
            return fail("interrupted", 130)
        except (ValueError, OSError, FloatingPointError) as error:
            if os.environ.get("IMAGEN_JAX_TRACEBACK"):
                raise
            return fail(" ".join(str(error).split()))

    app.run(guarded)


def fail(message: str, code: int = 2) -> int:
    """Prints `error: message` on standard error and returns the exit code."""
    print(f"error: {message}", file=sys.stderr)
    return code
