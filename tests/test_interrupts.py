"""A Ctrl-C in a callback, where Python drops exceptions, still ends the program."""

import subprocess
import sys

from imagen_jax import exit_codes
from tests import tiny

PROGRAM = """
import gc, signal, sys, time
from imagen_jax import cli, interrupts

def callback(phase, info):
    if phase == "start" and not interrupted:
        interrupted.append(True)
        signal.raise_signal(signal.SIGINT)

def main():
    gc.callbacks.append(callback)
    gc.collect()
    assert interrupted
    for _ in range(1000):  # a signal just before a long sleep would not wake it up
        time.sleep(0.01)

signal.signal(signal.SIGINT, signal.default_int_handler)  # ignored below a shell's background job
interrupted = []
interrupts.repeat_lost()
sys.exit(cli.guard(main))
"""


def test_an_interrupt_in_a_callback_is_not_lost():
    """Catches a command that goes on after Ctrl-C and ends with code 0."""
    ran = subprocess.run(
        [sys.executable, "-c", PROGRAM], cwd=tiny.ROOT, capture_output=True, text=True, timeout=15
    )
    assert ran.returncode == exit_codes.INTERRUPTED, ran.stderr
    assert ran.stderr == "error: interrupted\n"
