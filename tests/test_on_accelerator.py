"""tools/on_accelerator.py at its smallest, and what must hold when a measurement goes wrong."""

import json
import math
import os
import pathlib
import subprocess
import sys
import time

import pytest

from tests import tiny
from tools import on_accelerator
from tools.accelerator import kernels, results, running, tables, wheels
from tools.accelerator.parts import TESTS, TINY_TESTS, Parts

ABOUT = {"date": "2026-01-01", "commit": "abc", "command": "python", "python": "3.12"}


@pytest.fixture
def session(tmp_path):
    """A session of twenty seconds."""
    work = tmp_path / "work"
    work.mkdir()
    result = results.Results(tmp_path / "output", ABOUT)
    session = running.Session(result, work, time.monotonic() + 20, {}, tiny=True)
    yield session
    session.stop_all()


def python(code):
    return [sys.executable, "-c", code]


RECORD = (
    "import json, os; open(os.environ['ACCELERATOR_RECORDS'], 'a').write(json.dumps({}) + '\\n')"
)


def saved(session):
    return json.loads((session.results.output / "results.json").read_text())["parts"]


def test_failures_cost_their_own_measurement_only(session):
    """Catches a runner that stops at the first failure, hangs with a process, or loses records."""
    partial = RECORD.format("{'what': 'step', 'batch': 4}")
    session.command("train_speed", "raises", python("raise ValueError('bad shape')"), 10)
    session.command("train_speed", "hangs", python(f"{partial}; import time; time.sleep(60)"), 1.5)
    session.command("train_speed", "crashes", python("import os; os.abort()"), 10)
    session.command("train_speed", "works", python(partial), 10)
    result = saved(session)["train_speed"]
    assert result["raises"]["status"] == "failed with exit code 1: ValueError: bad shape"
    assert result["hangs"]["status"] == "ended: over its limit of 2 s"
    assert result["hangs"]["records"] == [{"what": "step", "batch": 4}]
    assert result["crashes"]["status"] == "failed: killed by SIGABRT"
    assert result["works"]["status"] == "done"
    assert "bad shape" in (session.results.output / "log.txt").read_text()


def test_a_process_that_ignores_sigterm_is_killed_with_its_children(session, tmp_path):
    """Catches a runner that only asks, or leaves grandchildren that hold the device's memory."""
    child = "import signal, time; signal.signal(signal.SIGTERM, signal.SIG_IGN); time.sleep(60)"
    code = f"import subprocess, sys; p = subprocess.Popen([sys.executable, '-c', {child!r}]); "
    code += f"open({str(tmp_path / 'pid')!r}, 'w').write(str(p.pid)); {child}"
    session.command("correct", "stubborn", python(code), 2)
    pid = int((tmp_path / "pid").read_text())
    deadline = time.monotonic() + 10  # SIGKILL is not waited for: the child belongs to init
    while is_running(pid):
        assert time.monotonic() < deadline
        time.sleep(0.05)


def is_running(pid):
    try:
        return pathlib.Path(f"/proc/{pid}/stat").read_text().split()[2] != "Z"
    except (FileNotFoundError, ProcessLookupError):
        return False


def test_out_of_memory_is_told_apart(session, monkeypatch, tmp_path):
    """Catches an out-of-memory error that reads like any other failure."""
    (tmp_path / "tools_fake.py").write_text(
        "import sys, types\n"
        "module = types.ModuleType('tools.accelerator.fake')\n"
        "def run(emit, tiny):\n"
        "    emit('step', batch=2)\n"
        "    raise RuntimeError('RESOURCE_EXHAUSTED: Out of memory allocating 9 bytes')\n"
        "module.run = run\n"
        "sys.modules['tools.accelerator.fake'] = module\n"
        "from tools.accelerator import task\n"
        "sys.argv = ['task', 'fake', '{\"tiny\": true}']\n"
        "sys.exit(task.main())\n"
    )
    outcome = session.command(
        "sampling", "base_2b", [sys.executable, tmp_path / "tools_fake.py"], 15,
        {"PYTHONPATH": str(tiny.ROOT)},
    )  # fmt: skip
    assert outcome.status.startswith("out of memory: RuntimeError: RESOURCE_EXHAUSTED")
    assert outcome.last("step") == {"what": "step", "batch": 2}


def test_no_time_left_is_reported(session):
    """Catches a measurement that starts after its part's end, or vanishes from the results."""
    session.begin(0.5)
    session.command("sampling", "sr_256", python("print(1)"), 10)
    assert saved(session)["sampling"]["sr_256"]["status"] == "not started: no time left"


def test_a_part_that_raises_does_not_end_the_run(session, monkeypatch):
    """Catches bookkeeping outside a process whose error loses the later parts."""
    monkeypatch.setattr(Parts, "sampling", lambda self: 1 / 0)
    monkeypatch.setattr(
        Parts,
        "side_by_side",
        lambda self: self.session.results.add("side_by_side", "PyTorch", "done", 0.0, []),
    )
    args = on_accelerator.arguments(["--output", "x", "--parts", "sampling,side_by_side"])
    on_accelerator.run(session, args)
    assert "ZeroDivisionError" in saved(session)["sampling"]["the part itself"]["status"]
    assert saved(session)["side_by_side"]["PyTorch"]["status"] == "done"


def test_every_measurement_has_a_well_formed_row():
    """Catches a table that drops what failed, or lets a pipe or a line break split a row."""
    step = {"what": "step", "batch": 8, "seconds": 0.1, "images_per_s": 80.0, "mfu": None}
    entry = lambda status, *records: {"status": status, "seconds": 1.0, "records": list(records)}
    drawn = {"what": "drawn", "wanted": 16, "batch": 8, "seconds": 1.0, "full_steps": 256}
    drawn |= {"full_seconds": 64.0, "images_per_s": 0.25}
    killed = {"what": "killed", "last_step": 80, "images_per_s": 12.5, "memory/device_gib": 2.0}
    ledger = {"what": "ledger", "outside_s": 9.0, "ledger_s": 8.9, "seconds": {"step": 8.9}}
    parts = {
        "correct": {"tests": entry("failed: a | b\nc")},
        "train_speed": {"base_500m": entry("done", step), "base_2b": entry("out of memory: x | y")},
        "sampling": {name: entry("done", drawn) for name in tables.STAGES},
        "side_by_side": {"PyTorch": entry("ended: over its limit of 5 s")},
        "long_run": {"base": entry("failed: a | b", killed, ledger)},
        "pictures": {"base": entry("done", {"what": "trained", "steps": 9, "loss": 0.5})},
    }
    page = tables.markdown(ABOUT, parts)
    assert_well_formed(page)
    assert "| base, killed | 80 | 12.5 | 2.00 GiB | - | - |  |" in page
    assert "base: 8.9 s in the ledger, 9.0 s outside; step 8.9 s." in page
    assert (
        "out of memory: x \\| y" in page
        and "| cascade | 16 | - | - | - | 192.00 s | 0.083 |" in page
    )


def assert_well_formed(page):
    """Each row of a table has as many cells as its head."""
    cells = None
    for line in page.splitlines():
        if not line.startswith("|"):
            cells = None
            continue
        assert line.endswith("|")
        number = line.replace("\\|", "").count("|")
        assert cells in (None, number), line
        cells = number


def test_kinds_of_kernels():
    """Catches numbered kernels counted apart, and convolutions of cuDNN taken for products."""
    assert kernels.plain("loop_add_fusion_12") == kernels.plain("loop_add_fusion.3")
    assert kernels.kind_of("sm90_xmma_fprop_implicit_gemm_bf16bf16") == "convolution"
    assert kernels.kind_of("nvjet_tst_128x256_64x4_2x1_v_bz_TNT") == "matrix product"


def test_only_missing_wheels_are_installed(tmp_path, monkeypatch):
    """Catches a wheel that replaces an installed package, such as JAX for its GPU."""
    for name in ("numpy-9.9-py3-none-any.whl", "surely_missing-1.0-py3-none-any.whl"):
        (tmp_path / name).touch()
    asked = []
    monkeypatch.setattr(wheels, "pip_install", lambda wanted, site: asked.extend(wanted) or True)
    wheels.install(tmp_path, tmp_path / "site")
    assert [wheel.name for wheel in asked] == ["surely_missing-1.0-py3-none-any.whl"]


def test_conftest_leaves_the_platform_to_the_caller():
    """Catches tests that run on the CPU although another platform was asked for."""
    code = "import os; from tests import conftest; print(os.environ['JAX_PLATFORMS'])"
    code += "; print(os.environ.get('XLA_FLAGS'))"
    variables = {k: v for k, v in os.environ.items() if k != "XLA_FLAGS"}
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=tiny.ROOT, capture_output=True, text=True,
        env=variables | {"IMAGEN_JAX_TEST_PLATFORM": "cuda"},
    )  # fmt: skip
    assert done.stdout.split() == ["cuda,cpu", "None"], done.stderr


def numbers(value):
    """All numbers in a JSON value."""
    if isinstance(value, dict):
        value = list(value.values())
    if isinstance(value, list):
        return [number for part in value for number in numbers(part)]
    return [value] if isinstance(value, (int, float)) and not isinstance(value, bool) else []


def ran(output, *flags, timeout):
    """The results of a call of the tool."""
    command = [sys.executable, "-m", "tools.on_accelerator", "--tiny", "--output", output, *flags]
    done = subprocess.run(
        list(map(str, command)), cwd=tiny.ROOT, capture_output=True, text=True, timeout=timeout
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert len(os.listdir(output)) <= 8
    assert_well_formed((output / "table.md").read_text())
    return json.loads((output / "results.json").read_text())["parts"]


@pytest.mark.slow
def test_train_step_is_measured(tmp_path):
    """Catches a step that is not timed 20 times, has no MFU or no memory, or a trace not read."""
    flags = ("--parts", "train_speed", "--models", "sr_1024", "--budget", "train_speed=600")
    result = ran(tmp_path / "output", *flags, "--minutes", "11", "--trials", "0", timeout=700)
    entry = result["train_speed"]["sr_1024"]
    assert entry["status"] == "done"
    records = {record["what"]: record for record in entry["records"]}
    step = records["step"]
    assert step["repeats"] == 20 and step["batch"] == 2
    assert step["images_per_s"] == pytest.approx(2 / step["seconds"])
    mfu = step["mfu"]
    assert mfu > 0 and step["analytic_bytes"] > 4 * step["parameters"]
    assert len(records["kernels"]["kernels"]) >= 3
    assert sum(records["kernels"]["kinds"].values()) == pytest.approx(1.0)
    assert all(math.isfinite(number) for number in numbers(records))


@pytest.mark.slow
@pytest.mark.timeout(3600)
@pytest.mark.skipif(
    "IMAGEN_JAX_EVERY_PART" not in os.environ,
    reason="takes half an hour; set IMAGEN_JAX_EVERY_PART=1",
)
def test_every_part_at_a_tiny_size(tmp_path):
    """Catches a part that cannot run from its command to its rows and files."""
    output = tmp_path / "output"
    budget = "correct=600,train_speed=600,sampling=600,side_by_side=600,long_run=400,pictures=900"
    flags = ("--minutes", "50", "--budget", budget, "--trials", "0")
    result = ran(output, *flags, timeout=3300)
    statuses = {
        name: entry["status"]
        for part, tasks in result.items()
        for name, entry in tasks.items()
        if not name.startswith("PyTorch")  # where PyTorch is not installed, it says so
    }
    assert set(statuses.values()) == {"done"}, statuses
    files = {"results.json", "table.md", "log.txt", "training.jsonl", "pictures.png"}
    files |= {f"{stage}.safetensors" for stage in ("base", "sr_1", "sr_2")}
    assert set(os.listdir(output)) == files
    assert all(os.path.getsize(output / name) < 16 << 20 for name in files)


@pytest.mark.parity
def test_pytorch_network_has_the_size_of_if():
    """Catches a side-by-side network of another architecture than DeepFloyd IF-I-M."""
    torch = pytest.importorskip("torch")
    from tools.accelerator import torch_unet

    with torch.device("meta"):
        network = torch_unet.UNet(**torch_unet.IF_I_M)
    assert sum(p.numel() for p in network.parameters()) == 371_605_830


def test_the_tests_that_run_on_the_device_exist():
    """Catches a renamed test file, for which pytest would run none of the others."""
    assert [name for name in (*TESTS, *TINY_TESTS) if not (tiny.ROOT / name).exists()] == []
