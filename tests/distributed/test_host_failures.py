"""Failures of hosts are kept in the workdir, and a host that fails again is named."""

import json

import pytest

from imagen_jax import exit_codes
from imagen_jax.distributed.host_failures import Failure, HostFailures, advice, read
from imagen_jax.training.replicas import Drift


def failed(host, process=0, code=exit_codes.LOST, time=0.0):
    return Failure(time, host, process, code, "no heartbeat")


def test_a_failure_that_several_processes_report_is_one(tmp_path):
    """Catches a host that is blamed once for each process that noticed."""
    for _ in range(3):
        HostFailures(tmp_path, "100-ab").record(2, "host-2", exit_codes.LOST, "lost process 2")
    HostFailures(tmp_path, "200-cd").record(2, "host-2", exit_codes.HARDWARE, "copies differ")
    found = read(tmp_path)
    assert [(one.host, one.process, one.code) for one in found] == [
        ("host-2", 2, exit_codes.LOST),
        ("host-2", 2, exit_codes.HARDWARE),
    ]


@pytest.mark.parametrize("code", [0, exit_codes.INVALID, exit_codes.NOT_FINITE])
def test_a_mistake_is_not_a_failure_of_the_host(tmp_path, code):
    """Catches a host that is removed because of a wrong option or a bad batch."""
    HostFailures(tmp_path, "1-a").record(0, "host", code, "x")
    assert read(tmp_path) == []


def test_the_error_of_a_single_process(tmp_path):
    """Catches a failure without its reason, and an error of many lines that breaks the record."""
    HostFailures(tmp_path, "1-a").record_own(Drift("the copies\ndiffer", [0]))
    (found,) = read(tmp_path)
    assert (found.code, found.reason) == (exit_codes.HARDWARE, "the copies differ")


def test_a_host_that_fails_again_is_to_be_removed():
    """Catches advice after one failure, or about the sum of all hosts."""
    once = [failed("a"), failed("b"), failed("c")]
    assert advice(once) == []
    (line,) = advice([*once, failed("b", code=-9, time=86_400.0)])
    assert line == (
        "host b failed 2 times in this run, last at 1970-01-02 00:00 UTC with exit code -9"
        " (no heartbeat): remove it from the job"
    )


def test_a_damaged_record_is_named(tmp_path, caplog):
    """Catches a run that cannot start because of a record that was cut short."""
    HostFailures(tmp_path, "1-a").record(0, "host", 1, "x")
    (tmp_path / "failures" / "2-b-0.json").write_text('{"time": 1')
    (tmp_path / "failures" / "3-c-0.json").write_text(json.dumps({"time": 1.0}))
    (tmp_path / "failures" / ".4-d-0.json.12.0a1b2c3d.tmp").write_text('{"time"')
    assert len(read(tmp_path)) == 1 and ".tmp" not in caplog.text
    assert "2-b-0.json" in caplog.text and "3-c-0.json is damaged" in caplog.text


def test_a_workdir_that_cannot_be_written_does_not_keep_a_process(tmp_path, caplog):
    """Catches an error in the report of an error."""
    (tmp_path / "failures").write_text("a file")
    HostFailures(tmp_path, "1-a").record(0, "host", 1, "x")
    assert "the failure of host was not recorded" in caplog.text
