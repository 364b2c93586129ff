"""The script that runs the paper's stages once, at tiny size."""

import json
import os
import subprocess
import sys

import pytest

from tests import tiny


@pytest.mark.slow
def test_each_part_reports_finite_values():
    """Catches a part that ends without its report, or reports another stage."""
    command = [sys.executable, "-m", "tools.full_size", "--tiny", "--sample"]
    command += ["--train=sr_1024:tiny"]
    env = os.environ | {"JAX_PLATFORMS": "cpu"}
    out = subprocess.run(command, cwd=tiny.ROOT, env=env, capture_output=True, text=True)
    assert out.returncode == 0, out.stderr[-2000:]
    rows = [json.loads(line) for line in out.stdout.splitlines()]
    assert [row.get("image") for row in rows[:3]] == [[1, n, n, 3] for n in (8, 16, 32)]
    assert [row.get("config") for row in rows[3:]] == ["sr_1024:tiny"]
    assert all(row["finite"] and row["peak_gib"] > 0.1 for row in rows)
    assert rows[3]["traced_tflop"] >= 0 and rows[3]["gradient_norm"] > 0
