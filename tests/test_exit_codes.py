"""Exit codes: one for each kind of failure, and what launchers do about them."""

import errno

import jax
import numpy as np
import pytest

from imagen_jax import cli, exit_codes
from imagen_jax.distributed import device_faults
from imagen_jax.storage import check_local
from imagen_jax.training.replicas import Drift
from imagen_jax.weights.checkpoint import CheckpointError

ERRORS = [
    (ValueError("no such field"), exit_codes.INVALID),
    (CheckpointError("damaged"), exit_codes.INVALID),
    (OSError(errno.ENOENT, "no such file"), exit_codes.INVALID),
    (OSError(errno.ESTALE, "stale file handle"), exit_codes.FAILED),
    (KeyError("a fault of the code"), exit_codes.FAILED),
    (FloatingPointError("the loss is not finite"), exit_codes.NOT_FINITE),
    (Drift("the copies differ", [1]), exit_codes.HARDWARE),
    (exit_codes.ProcessLost("no heartbeat"), exit_codes.LOST),
]
RUNTIME = {
    "DATA_LOSS: an uncorrectable error of HBM": exit_codes.HARDWARE,
    "INTERNAL: Core halted unexpectedly": exit_codes.HARDWARE,
    "FAILED_PRECONDITION: The program continuator has halted unexpectedly.": exit_codes.HARDWARE,
    "UNKNOWN: CUDA_ERROR_ECC_UNCORRECTABLE": exit_codes.HARDWARE,
    "INTERNAL: CUDA_ERROR_OUT_OF_MEMORY: out of memory": exit_codes.FAILED,
    "RESOURCE_EXHAUSTED: Out of memory; the device failed to allocate": exit_codes.INVALID,
    "UNAVAILABLE: Connection reset by peer": exit_codes.FAILED,
    "INVALID_ARGUMENT: shapes differ": exit_codes.FAILED,
}


@pytest.mark.parametrize("text", RUNTIME)
def test_a_device_that_fails_during_a_step(text):
    """Catches a failed device that is taken for a fault of the program, which keeps its host, and
    too little memory, a lost connection or a fault of the program blamed on the host.
    """
    with pytest.raises(RuntimeError) as caught, device_faults.named(lambda: 12):
        raise jax.errors.JaxRuntimeError(text)
    assert exit_codes.of(caught.value) == RUNTIME[text]
    failed = RUNTIME[text] == exit_codes.HARDWARE
    assert isinstance(caught.value, exit_codes.DeviceFailed) == failed
    assert not failed or f"a device failed after step 12: {text};" in str(caught.value)


def test_a_mistake_during_a_step_is_no_failure_of_a_device():
    """Catches an error of the input or the code that names the host as faulty."""
    for error in (ValueError("INTERNAL: x"), RuntimeError("DATA_LOSS: x"), OSError(5, "halted")):
        with pytest.raises(type(error)) as caught, device_faults.named(lambda: 12):
            raise error
        assert caught.value is error


@pytest.mark.parametrize("error, code", ERRORS, ids=lambda value: type(value).__name__)
def test_each_kind_of_failure_has_its_code(error, code):
    """Catches a loss that is not finite or a faulty device reported as invalid input, after which
    a launcher gives up, and invalid input reported as transient, which it repeats.
    """
    assert exit_codes.of(error) == code


def test_codes_differ_and_only_repeatable_failures_are_repeated():
    """Catches two kinds with one code, and a final code that is in no launcher's list."""
    codes = [exit_codes.FAILED, exit_codes.INVALID, exit_codes.NOT_FINITE, exit_codes.HARDWARE]
    codes += [exit_codes.LOST, exit_codes.INTERRUPTED]
    assert len({0, *codes}) == 7 and max(codes) < 137
    assert exit_codes.FINAL == (exit_codes.INVALID, exit_codes.NOT_FINITE)
    stated = [line.split()[0] for line in exit_codes.__doc__.splitlines() if line[:4] == "    "]
    assert sorted(map(int, stated)) == sorted([0, *codes])


@pytest.mark.parametrize(
    "error, code", [pair for pair in ERRORS if not isinstance(pair[0], KeyError)]
)
def test_a_command_ends_with_the_code_and_one_line(error, code, monkeypatch, capsys):
    """Catches a command that maps its errors by itself."""
    monkeypatch.setattr(cli.app, "run", lambda main, flags_parser: exits.append(main(["command"])))
    monkeypatch.delenv("IMAGEN_JAX_TRACEBACK", raising=False)
    exits = []

    def main():
        raise error

    cli.run(lambda: None, main)
    assert exits == [code]
    message = error.strerror if isinstance(error, OSError) else str(error)
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 1 and lines[0].startswith(f"error: {message}")


def raised_by(function):
    try:
        function()
    except Exception as error:
        return error


def test_an_error_of_a_library_is_not_a_mistake_of_the_user():
    """Catches a fault of the code that a launcher takes for invalid input and does not retry."""
    library = raised_by(lambda: np.stack([np.zeros(2), np.zeros(3)]))
    assert isinstance(library, ValueError) and not exit_codes.is_expected(library)
    assert exit_codes.of(library) == exit_codes.FAILED
    ours = raised_by(lambda: check_local("--output", "gs://b/x"))
    assert exit_codes.is_expected(ours) and exit_codes.of(ours) == exit_codes.INVALID
