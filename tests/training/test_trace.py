"""The option --profile and the trace it writes; tests/test_commands.py writes a real one."""

import logging

import pytest

from imagen_jax.train import read_profile
from imagen_jax.training.trace import Trace


def test_a_trace_that_was_asked_for_and_not_written_is_reported(tmp_path, caplog):
    """Catches --profile of steps that this process did not do, without a file and without a line;
    and a warning in a run without --profile.
    """
    with caplog.at_level(logging.WARNING), Trace(tmp_path, 20, 5) as trace:
        for done in range(30, 33):
            trace.before(done)
            trace.after(done + 1, lambda: None)
    assert "no trace: none of steps 20 to 25 was done" in caplog.text
    caplog.clear()
    with caplog.at_level(logging.WARNING), Trace(tmp_path, 0, 0):
        pass
    assert not caplog.records


@pytest.mark.parametrize("text", ["8:1", "20:5", "2:0"])
def test_a_profile_of_no_step_is_refused(text):
    """Catches a profile of steps behind the end of the run, which is accepted and never written."""
    with pytest.raises(ValueError, match="traces none of the 8 steps"):
        read_profile(text, 8)
    assert read_profile("7:5", 8) == (7, 5) and read_profile("", 8) == (0, 0)


@pytest.mark.parametrize("text", ["20", "a:b", "-1:5", "3:", "²:1"])
def test_a_profile_that_is_no_pair_is_refused(text):
    """Catches a traceback for a number that Python calls a digit and cannot read."""
    with pytest.raises(ValueError, match="is not FIRST:COUNT"):
        read_profile(text, 8)
