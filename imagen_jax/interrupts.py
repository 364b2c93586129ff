"""Ctrl-C that Python would lose.

Python raises KeyboardInterrupt wherever the main thread happens to be. In callbacks of the garbage
collector and of weak references, of which JAX has some, Python prints the exception and drops it:
the program goes on as if nothing had happened.
"""

import signal
import sys
import threading

AGAIN_S = 0.05  # the callback has ended by then


def repeat_lost() -> None:
    """From now on, a KeyboardInterrupt that Python drops is raised again a moment later."""
    report = sys.unraisablehook

    def hook(dropped) -> None:
        if dropped.exc_type is KeyboardInterrupt:
            main = threading.main_thread().ident
            threading.Timer(AGAIN_S, signal.pthread_kill, [main, signal.SIGINT]).start()
        else:
            report(dropped)

    sys.unraisablehook = hook
