"""plan with the TPU compiler: estimates against ideal times, the command, and its advice."""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from imagen_jax import sharding
from imagen_jax.hardware import topology
from imagen_jax.planning import block_costs, cost, hlo, links

pytest.importorskip("libtpu", reason="the TPU compiler comes with the extra `tpu`")
pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]
ROOT = Path(__file__).resolve().parent.parent
BF16 = jnp.bfloat16


def convolution(x, w):
    return jax.lax.conv_general_dilated(
        x, w, (1, 1), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC")
    )


# (program, shapes, FLOPs or 0, bytes or 0, largest ratio of the estimate to the ideal time)
OPERATIONS = {
    "matrix product": (lambda a, b: a @ b, [(4096, 4096), (4096, 4096)], 2 * 4096**3, 0, 1.2),
    "3x3 convolution": (
        convolution,
        [(8, 64, 64, 512), (3, 3, 512, 512)],
        2 * 8 * 64 * 64 * 9 * 512 * 512,
        0,
        1.6,
    ),
    "sum of two arrays": (
        lambda a, b: a + b,
        [(16384, 8192), (16384, 8192)],
        0,
        3 * 2 * 16384 * 8192,
        4.5,
    ),
}


@pytest.mark.parametrize("operation", OPERATIONS)
@pytest.mark.parametrize("name", ["v4:2x2x1", "v5e:2x2", "v5p:2x2x1", "v6e:2x2"])
def test_estimates_against_ideal_times(name, operation):
    """Catches a clock, a peak or a sum of cycles with which an operation is faster than the chip
    allows, or several times slower.
    """
    program, shapes, flops, size, slack = OPERATIONS[operation]
    hardware = topology.parse(name)
    chip = hardware.chip
    replicated = NamedSharding(Mesh(hardware.devices()[:1], "x"), PartitionSpec())
    arguments = [jax.ShapeDtypeStruct(shape, BF16, sharding=replicated) for shape in shapes]
    text = jax.jit(program).lower(*arguments).compile().as_text()
    items = list(cost.items(hlo.parse(text), chip))
    ideal = max(flops / chip.peak_flops, size / chip.memory_bandwidth)
    ratio = sum(item.seconds for item in items) / ideal
    print(f"{name} {operation}: {ratio:.2f} times the ideal time")
    assert 0.97 < ratio < slack
    assert all(item.estimated for item in items if item.seconds > 0.01 * ideal)


@pytest.mark.parametrize("name", ["v5e-1", "v6e-1", "2xv6e-1"])
def test_slices_of_one_chip(name):
    """Catches a compiler that knows no slice smaller than a host, and plans for the host's four
    chips.
    """
    assert len(topology.parse(name).devices()) == topology.parse(name).chips


def test_a_mesh_for_blocks_over_eight_chips():
    """Catches a row of the batch that eight chips compute, compiled for the four of the smallest
    slice.
    """
    hardware = block_costs.smallest(topology.parse("v5p:4x4x8"), 8)
    mesh = block_costs.block_mesh(hardware, {"model": 1, "spatial": 8})
    x = jax.ShapeDtypeStruct((2, 64, 8, 128), BF16, sharding=sharding.image_sharding(mesh))
    text = (
        jax.jit(convolution)
        .lower(x, jax.ShapeDtypeStruct((3, 3, 128, 128), BF16))
        .compile()
        .as_text()
    )
    assert (
        mesh.shape["spatial"] == 8
        and [c.kind for c in hlo.collectives(hlo.parse(text), 8)] == ["collective-permute"] * 2
    )


def test_all_gathers_are_overlapped_with_compute():
    """Catches compiler options that this version no longer accepts, and pieces of an all-gather
    that it marks in another way, so that each would be counted.
    """
    mesh = sharding.make_mesh(
        {"data": -1, "fsdp": 16, "model": 1, "spatial": 1}, topology.parse("v5p:4x4x8").devices()
    )
    rows, over_fsdp = (
        sharding.batch_sharding(mesh),
        NamedSharding(mesh, PartitionSpec(None, None, "fsdp", None)),
    )

    def loss(kernels, x):
        for kernel in kernels:
            x = x + jax.nn.silu(convolution(x, kernel))
            x = jax.lax.with_sharding_constraint(x, rows)
        return jnp.sum(x.astype(jnp.float32))

    kernels = [jax.ShapeDtypeStruct((3, 3, 512, 512), BF16, sharding=over_fsdp)] * 4
    x = jax.ShapeDtypeStruct((128 * 8, 32, 32, 512), BF16, sharding=rows)
    gradient = jax.jit(
        jax.grad(loss),
        out_shardings=[over_fsdp] * 4,
        compiler_options=sharding.compiler_options(mesh),
    )
    collectives = list(
        hlo.collectives(hlo.parse(gradient.lower(kernels, x).compile().as_text()), 128)
    )
    gathers, sums = (
        [c for c in collectives if c.kind == kind] for kind in ("all-gather", "reduce-scatter")
    )
    assert 4 <= len(gathers) <= 8, "one all-gather of a kernel per pass at most"
    assert (
        sum(c.overlapped for c in gathers) >= 0.75 * len(gathers)
        and sums
        and not any(c.overlapped for c in sums)
    )


def test_traffic_between_slices():
    """Catches a compiler that writes communication between slices in another way, so that the
    slowest communication is ignored.
    """
    hardware = topology.parse("4xv5e:2x2")
    mesh = sharding.make_mesh({"data": -1, "fsdp": 2, "model": 1, "spatial": 1}, hardware.devices())
    over = lambda *axes: NamedSharding(mesh, PartitionSpec(axes or None))
    gradient = jax.jit(
        jax.grad(lambda w, x: jnp.sum((x @ w) ** 2)),
        in_shardings=(over("fsdp"), over("data", "fsdp")),
        out_shardings=over("fsdp"),
    )
    text = (
        gradient.lower(
            jax.ShapeDtypeStruct((1024, 1024), jnp.float32),
            jax.ShapeDtypeStruct((1024, 1024), BF16),
        )
        .compile()
        .as_text()
    )
    devices = list(mesh.devices.flat)
    across = [
        c
        for c in hlo.collectives(hlo.parse(text), 16)
        if len({sharding.slice_of(devices[i]) for i in c.groups[0]}) == 4
    ]
    assert [(c.kind, c.bytes) for c in across] == [("all-reduce", 1024 * 1024 * 4 // 4)]
    assert links.seconds(across[0], devices, hardware) == pytest.approx(
        2 * 3 / 4 * 2**20 / hardware.chip.network_bandwidth
    )


def level(attention: bool) -> list[str]:
    """Flags for base_64:tiny with one level, which halves the compiler's work.

    It has every kind of block except resampling; with `attention` False it has no attention either.
    """
    fields = ("multipliers=(1,)", f"attention=({attention},)", f"text_attention=({attention},)")
    return ["--config=configs/base_64.py:tiny", *(f"--config.model.{field}" for field in fields)]


def plan(tmp_path, *options, what=tuple(level(attention=True)), topology="v5e-4"):
    """Runs the command and returns (exit code, plan).

    By default it plans for a network of one level on four v5e chips.
    """
    command = [
        sys.executable,
        "-m",
        "imagen_jax.plan",
        *what,
        f"--topology={topology}",
        "--json",
        f"--cache={tmp_path}/cache",
        *options,
    ]
    # The precision is a user's; "highest", which tests use, takes longer to compile.
    env = os.environ | {"PYTHONPATH": str(ROOT), "JAX_DEFAULT_MATMUL_PRECISION": "default"}
    done = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True)
    assert done.stdout, done.stderr
    return done.returncode, json.loads(done.stdout)


def test_plan_of_a_tiny_config(tmp_path):
    """Catches a missing part of the plan, a time without its blocks, and a second run that compiles
    blocks again.
    """
    code, result = plan(
        tmp_path, f"--output={tmp_path}/plan", "--price=1", "--config.train.sample_every=4"
    )
    assert (
        code == 0
        and result["memory"]["fits"]
        and result["chips"] == 4
        and result["sampler"]["fits"]
    )
    assert result["sampler"]["peak"] > sum(
        result["memory"]["parts"][part] for part in ("parameters", "EMA", "optimizer")
    )
    assert sum(result["memory"]["parts"].values()) >= result["memory"]["peak"]
    assert 0 < result["time"]["mfu"] < 1 and sum(
        result["time"]["kinds_s"].values()
    ) == pytest.approx(result["time"]["compute_s"])
    parameters = 4 * result["parameters"] / result["mesh"]["fsdp"]
    assert (
        6 * parameters < result["memory_traffic"]["bytes"]
        and result["memory_traffic"]["seconds"] < result["time"]["step_s"]
    )
    assert result["places"][0]["place"].split("/")[0] in ("down_0", "mid", "up_0")
    assert result["cost"]["money"] == pytest.approx(result["cost"]["chip_hours"])
    assert (tmp_path / "plan" / "plan.png").read_bytes()[:4] == b"\x89PNG" and json.loads(
        (tmp_path / "plan" / "plan.json").read_text()
    ) == result
    cached = {file: file.stat().st_mtime_ns for file in (tmp_path / "cache").iterdir()}
    assert cached and plan(tmp_path, "--nosampler")[1]["time"] == result["time"]
    assert {file: file.stat().st_mtime_ns for file in (tmp_path / "cache").iterdir()} == cached


def begin(*command):
    """Starts a process and waits until it compiles the whole step."""
    env = os.environ | {"PYTHONPATH": str(ROOT)}
    process = subprocess.Popen(
        [sys.executable, "-m", *command],
        cwd=ROOT,
        env=env,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    while "compiling the whole step" not in (line := process.stderr.readline()):
        assert line, process.wait()
    return process


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_ends_a_plan_at_once(tmp_path, number):
    """Catches the compiler's own handler, which prints what looks like a crash, and a signal that
    waits for the compiler.
    """
    process = begin(
        "imagen_jax.plan", *level(attention=True), "--topology=v5e-4", f"--cache={tmp_path}"
    )
    os.killpg(process.pid, number)
    _, errors = process.communicate(timeout=20)
    assert (
        process.returncode == 128 + number
        and errors.splitlines()[-1] == "error: interrupted; run the same command again to continue"
        and "received by PID" not in errors
    )


def test_a_plan_ends_with_scaling(tmp_path):
    """Catches a plan that runs on for an hour after the process that started it was killed."""
    process = begin(
        "tools.scaling",
        *level(attention=True),
        "--chip=v5e",
        "--chips=4",
        "--rows=2",
        f"--output={tmp_path}",
        f"--cache={tmp_path}/cache",
    )
    process.kill()
    _, errors = process.communicate(timeout=60)  # returns when the plan has ended as well
    assert "error: interrupted" in errors and not list(tmp_path.rglob("plan.json"))


@pytest.mark.long
def test_advice_works_when_followed(tmp_path):
    """Catches a program that does not fit reported as a crash, and advice that does not fit when it
    is compiled.
    """
    big = [*level(attention=False), "--config.data.batch_size=1048576", "--notime", "--nosampler"]
    code, searched = plan(tmp_path, "--search", what=big)
    asked, tried = searched["asked"], searched["tried"]
    assert (
        code == 0
        and not asked["fits"]
        and asked["peak"] > asked["limit"]
        and tried[-1]["peak"] == searched["memory"]["peak"] < asked["limit"]
    )
    followed = [f"--config.{field}={value}" for field, value in searched["overrides"].items()]
    code, again = plan(tmp_path, *followed, what=big)
    assert code == 0 and again["memory"]["peak"] == searched["memory"]["peak"]


def test_plan_of_a_text_encoder(tmp_path):
    """Catches a rate that ignores the number of rows, hours of one chip reported for all, and a
    wrong caption length.
    """
    assets = f"--text_encoder={ROOT}/imagen_jax/assets/t5_tiny"
    more = ("--captions=1000000", "--price=3")
    code, result = plan(tmp_path, "--tokens=16,64", *more, what=[assets])
    assert all(row["money"] == 3 * row["chip_hours"] for row in result["passes"])
    short, long = result["passes"]
    assert code == 0 and (short["tokens"], short["rows"], long["tokens"], long["rows"]) == (
        16,
        64,
        64,
        32,
    )
    assert (
        short["fits"]
        and 0 < short["flops"] / short["seconds"] < topology.parse("v5e-4").chip.peak_flops
    )
    assert short["captions_per_s_per_chip"] > 1.5 * long["captions_per_s_per_chip"]
    assert short["hours"] * 3600 * 4 * short["captions_per_s_per_chip"] == pytest.approx(1e6)


def test_text_encoders_in_the_training(tmp_path):
    """Catches an encoder without its weights, one that is planned for other rows than the batch,
    and a comparison that changes the plan of a run with stored features.
    """
    flags = ("--notime", "--nosampler", "--captions=1000,2000")
    online = ("--config.text.online=True", "--config.text.online_encoder=t5_tiny")
    code, result = plan(tmp_path, *flags, *online)
    _, stored = plan(tmp_path, *flags, "--text_encoder=t5_tiny")
    (encoder,) = result["online"]["encoders"]
    assert code == 0 and result["memory"]["parts"]["text encoders"] == encoder["weights"]
    assert 2 * 4.3e6 < encoder["weights"] < 2 * 4.5e6 and encoder["weights"] < encoder["peak"]
    assert result["memory"]["peak"] == stored["memory"]["peak"] + encoder["weights"]
    # Two captions of 32 tokens on each of four chips; the token embedding has no FLOPs.
    assert 0 < encoder["flops"] < 2 * 2 * 32 * 4.5e6
    assert encoder["flops"] / topology.parse("v5e-4").chip.peak_flops < encoder["seconds"] < 1e-2
    assert "online" not in stored and stored["text_costs"] == result["text_costs"]
    few, many = result["text_costs"]["rows"]
    assert many["break_even_steps"] == pytest.approx(2 * few["break_even_steps"])


@pytest.mark.parametrize("slices, fsdp", [("2xv5e:4x4", 8), ("v4-512", 16)])
def test_meshes_of_real_tori(slices, fsdp):
    """Catches a group of fsdp that extends over two slices, and an axis refused because no sides of
    the torus multiply to it (16 on 4x8x8).
    """
    mesh = sharding.make_mesh(
        {"data": -1, "fsdp": fsdp, "model": 1, "spatial": 1}, topology.parse(slices).devices()
    )
    assert all(
        len({sharding.slice_of(device) for device in group}) == 1
        for group in mesh.devices.reshape(-1, fsdp)
    )


def test_plan_of_gpus(tmp_path):
    """Catches a GPU compiler that needs a GPU, loops of accumulated batches that cannot be read,
    memory that is not compared with the limit, and times for which there is no estimate.
    """
    pytest.importorskip(
        "jax_cuda12_plugin", reason="the GPU compiler comes with the extra `gpu-plan`"
    )
    code, result = plan(
        tmp_path,
        "--nosampler",
        "--config.optim.accumulation=2",
        "--config.data.batch_size=16",
        "--config.text.online=True",
        "--config.text.online_encoder=t5_tiny",
        topology="h100-8",
    )
    assert result["online"]["is_bound"] and 0 < result["online"]["seconds"] < 1e-3
    assert (
        code == 0
        and result["chips"] == 8
        and result["memory"]["level"] == "default"
        and "time" not in result
    )
    assert (
        0 < result["memory"]["peak"] < result["memory"]["limit"]
        and result["collectives"]
        and result["memory_traffic"]["bytes"] > result["memory"]["parts"]["parameters"]
    )
