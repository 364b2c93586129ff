"""The plan as text and as a picture."""

import pytest

from imagen_jax.planning import plan_report

GIB = 2**30
PLAN = {
    "config": "base",
    "topology": "v5e:2x2",
    "platform": "tpu",
    "chips": 4,
    "mesh": {"data": 4, "fsdp": 1},
    "batch": 8,
    "accumulation": 1,
    "remat": "none",
    "parameters": 1000,
    "not_split": ["params/odd [7, 7]: no dimension"],
    "flops": {"per_image": 1e12, "per_step": 8e12, "per_chip_and_step": 2e12},
    "memory": {
        "fits": False,
        "peak": 20 * GIB,
        "limit": 16 * GIB,
        "level": "O0",
        "parts": {"parameters": GIB, "temporaries": 19 * GIB},
    },
}
FITS = PLAN | {"memory": PLAN["memory"] | {"fits": True, "peak": 8 * GIB}}
TIMES = {
    "step_s": 1.5,
    "compute_s": 1.0,
    "gathers_s": 0.25,
    "sums_s": 0.3,
    "exposed_traffic_s": 0.0,
    "update_s": 0.2,
    "at_best_s": 1.2,
    "in_turn_s": 1.75,
    "mfu": 0.5,
    "images_per_s_per_chip": 1.33,
    "kinds_s": {"matrix": 0.9, "copy": 0.1},
    "roofline_share_of_compute": 0.02,
}


def test_a_plan_that_does_not_fit_says_what_to_do():
    """Catches a report without the excess, and advice without its estimate."""
    advice = [
        {"overrides": {"model.remat": "matrix"}, "estimated_peak": 18 * GIB},
        {"overrides": {"mesh.fsdp": 4}, "estimated_peak": GIB},
    ]
    plan = PLAN | {"advice": advice}
    text = plan_report.text(plan)
    assert "20.00 GiB of 16.00 GiB, DOES NOT FIT by 4.00 GiB" in text
    assert "--config.model.remat=matrix: about 18.00 GiB, not enough" in text
    assert "--config.mesh.fsdp=4: about 1.00 GiB, would fit" in text
    assert "WARNING: not sharded: params/odd" in text
    assert plan_report.picture(plan)[:4] == b"\x89PNG"


def test_advice_that_is_not_enough():
    """Catches a list of changes that ends without a word although none of them fits."""
    row = {"overrides": {"model.remat": "matrix"}, "estimated_peak": 18 * GIB}
    assert "None is enough" in plan_report.text(PLAN | {"advice": [row]})
    assert "None is enough" in plan_report.text(PLAN | {"advice": []})


def test_a_plan_found_by_search():
    """Catches the overrides of a plan that fits left out, so that another config would be run."""
    tried = [{"overrides": {"mesh.fsdp": 4}, "estimated_peak": GIB, "peak": 2 * GIB}]
    search = {"overrides": {"mesh.fsdp": 4}, "asked": {"peak": 20 * GIB}, "tried": tried}
    text = plan_report.text(FITS | search)
    assert (
        "needs 20.00 GiB per chip and does not fit. This plan is for --config.mesh.fsdp=4" in text
    )
    assert "--config.mesh.fsdp=4: 2.00 GiB (estimate was 1.00 GiB)" in text


def test_samplers():
    """Catches the memory of the training left out of a sample grid's, and a full image that does
    not fit reported without a remedy.
    """
    plan = FITS | {
        "sampler": {"rows": 16, "steps": 256, "peak": 3 * GIB, "beside": GIB, "fits": True},
        "whole_images": {"size": 1024, "rows": 8, "peak": 20 * GIB, "fits": False},
    }
    text = plan_report.text(plan)
    assert (
        "16 images at once, 256 sampling steps, 3.00 GiB per chip, fits\n  1.00 GiB of it" in text
    )
    assert "full images of 1024 pixels after training: 8 at once, 20.00 GiB per chip, DOES" in text
    assert "--config.mesh.spatial" in text


def test_times():
    """Catches a part of the step under another's name, and parts that do not add up to it."""
    cost = {"steps": 10, "hours": 0.5, "chip_hours": 2.0}
    text = plan_report.text(FITS | {"time": TIMES, "cost": cost})
    lines = {line.split("  ")[1]: line for line in text.splitlines() if line.startswith("  ")}
    assert "1,500.00 ms" in text and "MFU 50.0 %" in text
    assert "250.00 ms   overlapped with compute" in lines["parameter all-gathers"]
    assert "300.00 ms   exposed" in lines["gradient reductions"]
    assert "200.00 ms" in lines["parameter update"]
    assert "90.0 % matrix, 10.0 % copy" in lines["compute"]
    assert "10 steps: 0.50 hours, 2.00 chip-hours" in text and "price" not in text
    assert sum(plan_report._step_parts(TIMES).values()) == pytest.approx(1e3 * TIMES["step_s"])


@pytest.mark.parametrize(
    "peak, level, warns",
    [(15.9, "O0", True), (15, "O0", False), (20, "O0", False), (15.9, "default", False)],
)
def test_a_peak_near_the_limit(peak, level, warns):
    """Catches an approximate peak trusted near the limit, and a warning about an exact one."""
    memory = PLAN["memory"] | {"fits": peak <= 16, "peak": peak * GIB, "level": level}
    assert ("check with --exact" in plan_report.text(PLAN | {"memory": memory})) == warns


@pytest.mark.parametrize(
    "size, text",
    [(512, "512.00 B"), (1536, "1.50 KiB"), (3 * 2**20, "3.00 MiB"), (2048 * GIB, "2,048.00 GiB")],
)
def test_units(size, text):
    """Catches small models reported as "0.00 GiB"."""
    assert plan_report._size(size) == text


def test_small_times():
    """Catches "0.00 ms" for a short time, and "0 hours" and no cost for a short training."""
    cost = {"steps": 1, "hours": 1e-4, "chip_hours": 150.0, "money": 0.0123}
    short = TIMES | {"update_s": 4e-6}
    text = plan_report.text(FITS | {"time": short, "cost": cost})
    assert "0.004 ms   optimizer" in text
    assert "0.0001 hours, 150 chip-hours, 0.0123 at the given price" in text


def test_traffic():
    """Catches equal modules listed with one module's name only, and the units of traffic."""
    row = {"kind": "all-reduce", "axes": ("data",), "count": 2, "bytes": 880_000, "seconds": 0.002}
    traffic = {"bytes": 3e9, "seconds": 0.004}
    modules = [{"place": "mid/attn_0", "others": 3, "seconds": 0.01, "share": 0.5}]
    plan = {"collectives": [row], "memory_traffic": traffic, "places": modules}
    text = plan_report.text(FITS | plan)
    assert "10.00 ms  50.0 %   mid/attn_0 (x4)" in text
    assert "3.00 GB read and written, 4.00 ms at full bandwidth" in text
    assert "all-reduce          over data" in text and "2 x  880.00 kB      2.00 ms" in text


def test_a_plan_of_buckets_says_which_one_it_is_for():
    """Catches numbers of one image size that look as if they were those of all."""
    buckets = {"buckets": ["8x8", "4x12"], "planned_size": "8x8"}
    line = "2 buckets; all numbers are for steps on the one with the most pixels, 8x8"
    assert line in plan_report.text(PLAN | buckets)
    assert "buckets" not in plan_report.text(PLAN | buckets | {"buckets": ["8x8"]})
