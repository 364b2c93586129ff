"""A device fails during a step of a training; the run continues from its newest checkpoint."""

import pytest

from imagen_jax import exit_codes
from imagen_jax.distributed import host_failures
from imagen_jax.run_log import read_metrics
from tests import processes, tiny
from tests.data import synthetic

pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]
STEPS = 6
TEXT = "DATA_LOSS: an uncorrectable error of HBM"


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    root = tmp_path_factory.mktemp("prepared")
    return synthetic.write_prepared(root / "data", images=40)


def start(data, workdir, logs, count, failing=None, text=TEXT):
    """failing: the process whose device fails during its fourth step."""
    options = [
        f"--config={tiny.ROOT}/configs/base_64.py:tiny",
        f"--workdir={workdir}",
        f"--config.data.path={data}",
        f"--config.text.dim={synthetic.DIM}",
        f"--config.train.steps={STEPS}",
        "--config.train.save_every=2",
        "--config.train.log_every=1",
        f"--config.mesh.fsdp={count}",
        "--config.mesh.fsdp_min_elements=64",
        "--host_lost=12",
        "--host_timeout=60",
    ]
    source = f"import os; os.environ['FAILING_DEVICE'] = '4:{text}';"
    source += "from tests import failing_device; failing_device.main()"

    def command(process):
        return [*(["-c", source] if process == failing else ["-m", "imagen_jax.train"]), *options]

    return processes.start(command, logs, count, count)


def test_a_device_of_one_of_two_hosts(data, tmp_path):
    """Catches the other host that is blamed, a code after which a launcher gives up, a host that
    nobody names, and steps that are lost although they were saved.
    """
    workdir, logs = tmp_path / "run", tmp_path / "log"
    running = start(data, workdir, logs, 2, failing=1)
    try:
        codes = [process.wait(timeout=120) for process in running]
    finally:
        for process in running:
            process.kill()
    said = [processes.log_of(logs, i).read_text() for i in range(2)]
    assert codes == [exit_codes.LOST, exit_codes.HARDWARE], said
    assert f"error: a device failed after step 3: {TEXT}; restart" in said[1]
    assert "process 1 (" in said[0] and f"a device failed after step 3: {TEXT}" in said[0]
    assert "Traceback" not in said[1]
    (failure,) = host_failures.read(workdir)
    assert (failure.process, failure.code) == (1, exit_codes.HARDWARE)
    assert failure.host and failure.reason.startswith("a device failed after step 3: DATA_LOSS")
    processes.finish(start(data, workdir, logs, 2), logs)
    assert [row["step"] for row in read_metrics(workdir)] == list(range(1, STEPS + 1))


@pytest.mark.parametrize(
    "text, code, recorded",
    [
        (TEXT, exit_codes.HARDWARE, 1),
        ("RESOURCE_EXHAUSTED: Out of memory allocating 9 bytes.", exit_codes.INVALID, 0),
    ],
)
def test_a_single_process(data, tmp_path, text, code, recorded):
    """Catches a host that is not named, and one that is named because the batch is too large."""
    workdir, logs = tmp_path / "run", tmp_path / "log"
    (process,) = start(data, workdir, logs, 1, failing=0, text=text)
    assert process.wait(timeout=300) == code, processes.log_of(logs, 0).read_text()
    found = host_failures.read(workdir)
    assert [failure.code for failure in found] == [code] * recorded
