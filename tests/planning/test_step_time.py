"""What plan reports, as far as it needs no compiler for other hardware: blocks, their sum, memory's
parts, advice, the report.
"""

import copy
import math
import re
import subprocess
import sys
from types import SimpleNamespace

import jax
import pytest
from ml_collections import config_flags

from imagen_jax import plan, sharding
from imagen_jax.hardware import topology
from imagen_jax.planning import block_costs, plan_report, step_time, whole_step
from imagen_jax.stage import create_stage
from imagen_jax.training import sample_grids
from imagen_jax.training.step import TrainProgram, forward_flops
from tests import tiny

NAMES = ("base_64", "sr_256", "sr_1024")
OUT_OF_MEMORY = (
    (
        "RESOURCE_EXHAUSTED: Ran out of memory on HBM, the total memory required for HLO"
        " temporaries (28.41G) exceeds available HBM (15.75G)."
    ),
    (
        "RESOURCE_EXHAUSTED: Ran out of memory in memory space hbm. Used 28.41G of 15.75G hbm."
        " Exceeded hbm capacity by 12.66G."
    ),
)


@pytest.mark.parametrize("name", NAMES)
def test_blocks_are_the_whole_network(name):
    """Wrong: a module in no block or in two, equal blocks counted once, FLOPs that do not add up to
    the loss's.
    """
    stage, b = create_stage(tiny.config(name)), 4
    blocks = block_costs.find_blocks(stage, b)
    params = jax.eval_shape(stage.init, jax.random.key(0))
    counted = sum(
        len(block.places) * sum(leaf.size for leaf in jax.tree.leaves(block.params))
        for block in blocks
    )
    assert counted == sum(leaf.size for leaf in jax.tree.leaves(params))
    assert any(len(block.places) > 1 for block in blocks)

    def flops(block):
        forward, _, shapes = block_costs.block_program(stage, block)
        return jax.jit(forward).lower(*shapes[:3]).cost_analysis()["flops"]

    total = sum(len(block.places) * flops(block) for block in blocks)
    assert total == pytest.approx(
        b * forward_flops(stage), rel=0.1
    )  # losses, noise and resampling are in no block


def test_block_program_is_forward_and_backward():
    """Wrong: a program whose gradients are those of nothing, of the input only, or of a stem's
    input that nobody needs.
    """
    stage = create_stage(tiny.config("base_64"))
    blocks = {block.places[0]: block for block in block_costs.find_blocks(stage, 2)}
    for place, has_input_gradient in (("down_1/block_0", True), ("stem", False)):
        _, both, shapes = block_costs.block_program(stage, blocks[place])
        out, (d_params, d_input) = jax.eval_shape(both, *shapes)
        assert jax.tree.map(lambda a: a.shape, d_params) == jax.tree.map(
            lambda a: a.shape, blocks[place].params
        )
        assert bool(d_input) == has_input_gradient and out[0].shape[0] == 2


DAMAGED = (
    '{"seco',
    "{}",
    "[]",
    "null",
    '{"seconds": -1, "kinds": {}}',
    '{"seconds": NaN, "kinds": {}}',
    '{"seconds": 1, "kinds": {"copy": "1"}}',
    '{"seconds": 1, "kinds": []}',
    '{"seconds": true, "kinds": {}}',
    '{"seconds": 1, "kinds": {}, "more": 1}',
    "[" * 100_000,
)


def test_a_damaged_cost_is_made_again(tmp_path, monkeypatch):
    """Wrong: a plan that a damaged file in the cache stops for ever, also one that is JSON or
    cannot be replaced; a cost computed although it is known.
    """
    monkeypatch.setattr(
        block_costs.importlib.metadata, "version", lambda package: "1"
    )  # the TPU compiler need not be here
    made = []
    compute = lambda: made.append(1) or {"seconds": len(made), "kinds": {"copy": 0.5}}
    cached = lambda: block_costs._cached(
        str(tmp_path), "key", {"seconds": float, "kinds": dict}, compute
    )["seconds"]
    assert cached() == cached() == 1
    (file,) = tmp_path.iterdir()
    for i, text in enumerate(DAMAGED):
        file.write_text(text)
        assert cached() == cached() == len(made) == 2 + i
    file.unlink()
    file.mkdir()
    assert cached() == len(made) == 2 + len(DAMAGED)


def test_rows_per_chip():
    """Wrong: rows divided by the axes that do not split the batch, or the parts of an accumulated
    batch forgotten.
    """
    config = tiny.config("base_64")
    config["data"]["batch_size"], config["optim"]["accumulation"] = 2048, 2
    config["mesh"] |= {"model": 2, "spatial": 1}
    assert block_costs.rows_per_chip(config, topology.parse("v5e:16x16")) == 8
    config["mesh"] |= {"data": 8, "fsdp": 16, "model": -1}
    assert block_costs.rows_per_chip(config, topology.parse("v5e:16x16")) == 8, (
        "an axis that is what is left"
    )


@pytest.mark.parametrize(
    "name, chips, shape",
    [
        ("v5e:16x16", 1, (2, 2)),
        ("v5e:16x16", 4, (2, 2)),
        ("v5p-256", 4, (2, 2, 1)),
        ("v5e:16x16", 8, (2, 4)),
        ("4xv5p-256", 16, (2, 2, 4)),
    ],
)
def test_blocks_have_the_chips_they_are_split_over(name, chips, shape):
    """Wrong: blocks of mesh.spatial=8, which plan itself advises, on the four chips of the smallest
    slice; other slices than before for fewer, whose costs are kept.
    """
    assert block_costs._smallest(topology.parse(name), chips).shape == shape


def test_chips_that_no_slice_is_made_of():
    """Wrong: a crash of the compiler after the whole step was compiled; an axis that is what is
    left taken for -1.
    """
    config = step_time.overridden(tiny.config("base_64"), {"mesh.data": 64, "mesh.spatial": -1})
    block_costs.check_columns(config, topology.parse("v5p:4x4x8"))
    with pytest.raises(ValueError, match="= 3: blocks on so many chips cannot be timed; --notime"):
        block_costs.check_columns(config, topology.parse("v5p:4x4x12"))


def program(name="base_64", sizes=(2, 4, 1, 1), **overrides):
    config = step_time.overridden(tiny.config(name), {"mesh.fsdp_min_elements": 8} | overrides)
    return TrainProgram.create(config, sharding.make_mesh(dict(zip(sharding.AXES, sizes))))


def test_parts_of_memory():
    """Wrong: a part as large on every mesh, activations that ignore rows, accumulation or remat."""
    whole, split = (
        whole_step.state_parts(program(sizes=(8, 1, 1, 1))),
        whole_step.state_parts(program()),
    )
    for part in ("parameters", "EMA", "optimizer", "gradients"):
        assert 0.25 <= split[part] / whole[part] < 0.4
    assert split["batch"] == whole["batch"] and split["activations"] == whole["activations"] > 0
    more = whole_step.state_parts(program(**{"optim.ema_tracks": [0.9, 0.5]}))
    assert more == split | {"EMA tracks": 2 * split["EMA"]}
    kept = {
        remat: whole_step.kept_bytes(program(**{"model.remat": remat}))
        for remat in step_time.REMAT_KINDS
    }
    assert kept["none"] > kept["matrix"] > kept["block"]
    assert whole_step.kept_bytes(program(sizes=(2, 2, 1, 2))) == pytest.approx(
        kept["none"], rel=0.05
    )
    big = {"data.batch_size": 16}
    halves = whole_step.kept_bytes(program(**big | {"optim.accumulation": 2}))
    assert (
        halves == pytest.approx(kept["none"], rel=0.01)
        and whole_step.kept_bytes(program(**big)) > 1.5 * kept["none"]
    )


@pytest.mark.parametrize("name", ("base_64", "sr_256"))
def test_the_sampler_is_the_one_that_training_runs(name, monkeypatch):
    """Wrong: the sampler of whole images where a crop is trained on, of a batch that is divided as
    a training batch is, of other rows than a grid has.
    """
    made, rows = program(name), 3
    monkeypatch.setattr(
        sample_grids.pipeline,
        "open_prepared",
        lambda data: SimpleNamespace(
            evaluation_split="train", manifest={"counts": {"images": {"train": 9}}}
        ),
    )
    monkeypatch.setattr(
        sample_grids.pipeline,
        "eval_rows",
        lambda data, rows, split: tiny.batch(made.stage, len(rows)),
    )
    drawn = sample_grids.SampleGrid(
        tiny.config(name, train__sample_rows=rows), made.stage, made.mesh
    )
    fields = {
        field: jax.ShapeDtypeStruct(a.shape, a.dtype)
        for field, a in drawn._batch.items()
        if field != "image"
    }
    assert (
        whole_step.lower_sampler(made, rows).as_text()
        == drawn._draw.lower(made.abstract.ema, fields).as_text()
    )


def test_whole_images_are_of_the_stage_and_not_of_its_crops():
    """Wrong: the memory of a crop's sampler for that of the image, which is larger; fewer images
    than the mesh has parts.
    """
    made = program("sr_1024", sizes=(2, 2, 1, 2))
    assert made.stage.train_size < made.stage.image_size
    assert whole_step.lower_whole_images(made).out_info.shape == (
        4,
        made.stage.image_size,
        made.stage.image_size,
        3,
    )


def found_memory(step, grid, limit=16):
    """As much of a plan as decides whether it fits."""
    sampler = {"rows": 64, "peak": grid, "beside": 3, "fits": grid <= limit}
    return {
        "memory": {"fits": step <= limit, "peak": step, "limit": limit, "parts": {"EMA": 1}},
        "sampler": sampler,
    }


def test_a_grid_that_does_not_fit_is_no_plan_that_fits():
    """Wrong: exit code 0 for a training that ends when it draws its first samples; advice that
    changes the step, which fits; rows that no device has fewer of.
    """
    assert (
        plan.fits(found_memory(10, 15))
        and not plan.fits(found_memory(20, 15))
        and not plan.fits(found_memory(10, 20))
    )
    assert (
        plan.needed(found_memory(10, 20)) == 20
        and plan.needed({"memory": found_memory(10, 20)["memory"]}) == 10
    )
    config = tiny.config("base_64", train__sample_rows=64, mesh__fsdp=2)
    rows = list(plan.advice(config, topology.parse("v5e:4x4"), found_memory(10, 20)))
    assert [row["overrides"] for row in rows] == [
        {"train.sample_rows": 32},
        {"train.sample_rows": 16},
        {"train.sample_every": 0},
    ]
    assert [row["estimated_peak"] for row in rows] == [4 + 8, 4 + 4, 10]


@pytest.mark.parametrize("message", OUT_OF_MEMORY)
def test_what_a_refused_program_needs(message):
    """Wrong: the memory there is taken for what is needed; another error taken for this one."""
    assert whole_step.needed_bytes(message) == int(28.41 * 2**30)
    assert whole_step.needed_bytes("INVALID_ARGUMENT: (28.41G) exceeds") is None


def test_step_time_adds_up():
    """Wrong: traffic that is hidden added, traffic that is not left out, blocks counted once, MFU
    of the time of one part.
    """
    made, place = program(), topology.parse("v5e:2x4")
    block = block_costs.BlockCost(
        ("a", "b"), 0.5, 1.0, 6.0, {"matrix": 0.4, "copy": 0.1}, 0.05, {"": 0.5}
    )
    traffic = [
        whole_step.Traffic("all-gather", ("fsdp",), 1, 1, 0.3),
        whole_step.Traffic("collective-permute", ("spatial",), 1, 1, 0.2),
    ]
    flops = 0.1 * place.chip.peak_flops
    found = step_time.predict(made, place, flops, [block], 0.07, traffic)
    assert found["step_s"] == pytest.approx(1.0 + 0.2 + 0.07) and found["mfu"] == pytest.approx(
        0.1 / found["step_s"]
    )
    assert found["kinds_s"] == {"matrix": pytest.approx(0.8), "copy": pytest.approx(0.2)} and found[
        "roofline_share_of_compute"
    ] == pytest.approx(0.1)
    assert step_time.memory_traffic(place, step_time.blocks_bytes(made, [block]))[
        "seconds"
    ] == pytest.approx(12.0 / place.chip.memory_bandwidth)
    slow = [whole_step.Traffic("all-gather", ("data", "fsdp"), 1, 1, 3.0)]
    assert step_time.predict(made, place, flops, [block], 0.07, slow)["step_s"] == pytest.approx(
        3.0 + 0.07
    )
    summed = [
        whole_step.Traffic("all-gather", ("fsdp",), 1, 1, 0.8, 0.6),
        whole_step.Traffic("reduce-scatter", ("fsdp",), 1, 1, 0.4),
        whole_step.Traffic("all-reduce", ("data",), 1, 1, 0.1),
    ]
    times = step_time.predict(made, place, flops, [block], 0.07, summed)
    assert [times[part] for part in ("step_s", "at_best_s", "in_turn_s")] == pytest.approx(
        [1.0 + 0.5 + 0.07, 1.3 + 0.07, 1.0 + 1.3 + 0.07]
    )
    assert step_time.schedule(summed) == {"gathers_beside": pytest.approx(0.75), "sums_beside": 0.0}


def test_shapes_on_a_chip():
    """Wrong: shapes of whole parameters, or of fewer than there are."""
    made, whole = program(), program(sizes=(8, 1, 1, 1))
    count = sum(leaf.size for leaf in jax.tree.leaves(made.abstract.params))
    elements = lambda shapes: sum(n * math.prod(shape) for shape, n in shapes.items())
    assert elements(step_time.shapes_on_a_chip(whole)) == count
    assert 0.25 <= elements(step_time.shapes_on_a_chip(made)) / count < 0.4


def test_places():
    """Wrong: a block's forward and backward passes as two places, equal blocks one by one, a kernel
    left out.
    """
    inside = {"ResBlock/conv_0": 0.2, "conv_0": 0.3, "": 0.1}
    blocks = [
        block_costs.BlockCost(("down_1/block_1", "down_1/block_2"), 0.6, 1.0, 0.0, {}, 0.0, inside),
        block_costs.BlockCost(("mid/attn_0",), 0.7, 1.0, 0.0, {"kernel": 0.7}, 0.0, {}),
    ]
    rows = step_time.places(blocks, times=2)
    assert [(row["place"], row["others"]) for row in rows] == [
        ("down_1/block_1/conv_0", 1),
        ("mid/attn_0/attend", 0),
        ("down_1/block_1", 1),
    ]
    assert rows[0]["seconds"] == pytest.approx(2.0) and rows[0]["share"] == pytest.approx(1.0 / 1.9)


MESHES = (
    {"data": -1},
    {"data": 4},
    {"fsdp": -1, "data": 4},
    {"data": 4, "spatial": -1},
    {"data": 4, "model": -1},
)


@pytest.mark.parametrize("mesh", MESHES, ids=str)
def test_alternatives_can_all_be_made(mesh):
    """Wrong: advice that a run would refuse, such as another fsdp beside a number for data; another
    order than cheapest first; none at all.
    """
    config = tiny.config("base_64")
    config["data"]["batch_size"], config["model"]["remat"] = 64, "matrix"
    config["mesh"] |= {"fsdp": 2, "fsdp_min_elements": 8} | mesh
    place = topology.parse("v5e:2x4")
    before = copy.deepcopy(config)
    found = step_time.alternatives(config, place)
    assert found[0] == {"model.remat": "block"}
    order = ("model.remat", "mesh.fsdp", "optim.accumulation", "mesh.spatial", "data.batch_size")
    kinds = [
        max(
            (field for field, value in alternative.items() if field in order and value != 1),
            key=order.index,
        )
        for alternative in found
    ]
    assert tuple(dict.fromkeys(kinds)) == order
    for overrides in found:
        changed = step_time.overridden(config, overrides)
        sharding.check_batch(changed["data"]["batch_size"], sharding.mesh_sizes(changed["mesh"], 8))
        if mesh == MESHES[1]:
            TrainProgram.create(changed, sharding.make_mesh(changed["mesh"]))
    assert {"model.remat": "block", "optim.accumulation": 2} in found and {
        "model.remat": "block",
        "data.batch_size": 32,
    } in found
    assert config == before, "the config itself is not changed"


def test_advice_for_slices():
    """Wrong: an fsdp that only chips of several slices make up, which a run would refuse."""
    config = step_time.overridden(tiny.config("base_64"), {"data.batch_size": 64})
    found = step_time.alternatives(config, topology.parse("2xv5e:2x2"))
    assert max(alternative.get("mesh.fsdp", 1) for alternative in found) == 4


def test_report_says_what_is_wrong():
    """Wrong: a plan that does not fit reported without by how much and what to do."""
    found = {
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
            "peak": 20 * 2**30,
            "limit": 16 * 2**30,
            "level": "O0",
            "parts": {"parameters": 2**30, "temporaries": 19 * 2**30},
        },
        "advice": [
            {"overrides": {"model.remat": "matrix"}, "estimated_peak": 18 * 2**30},
            {"overrides": {"mesh.fsdp": 4}, "estimated_peak": 2**30},
        ],
    }
    text = plan_report.text(found)
    found |= {
        "sampler": {"rows": 16, "steps": 256, "peak": 3 * 2**30, "beside": 2**30, "fits": True}
    }
    assert (
        "16 images of 256 steps at once, 3.00 GiB a chip, fits\n  1.00 GiB of that are parameters"
        in plan_report.text(found)
    )
    found |= {"whole_images": {"size": 1024, "rows": 8, "peak": 20 * 2**30, "fits": False}}
    assert (
        "whole images of 1024 pixels, 8 at once, without a training beside: 20.00 GiB a chip, DOES"
        " NOT FIT" in plan_report.text(found)
    )
    assert "not split: params/odd" in text
    assert (
        "DOES NOT FIT, 4.00 GiB too much" in text
        and "--config.mesh.fsdp=4: about 1.00 GiB, would fit" in text
    )
    assert "--config.model.remat=matrix: about 18.00 GiB, not enough" in text
    assert plan_report.picture(found)[:4] == b"\x89PNG"
    near = lambda peak, level: (
        "TOO NEAR"
        in plan_report.text(
            found
            | {
                "memory": (
                    found["memory"] | {"fits": peak <= 16, "peak": peak * 2**30, "level": level}
                )
            }
        )
    )
    assert (
        near(15.9, "O0") and not near(15, "O0") and not near(20, "O0") and not near(15.9, "default")
    )


WRONG = {  # a config, and what is said of it
    "def get_config(arg=''):\n    return 1 / 0\n": ":2: ZeroDivisionError: division by zero",
    "def get_config(arg=''):\n    return int('x')\n": ":2: ValueError: invalid literal for int",
    "import no_such_module\n": ":1: ModuleNotFoundError: No module named 'no_such_module'",
    "def get_config(arg=''):\n    return {}['b']\n": ":2: KeyError: 'b'",
}


@pytest.mark.filterwarnings("ignore:the load_module")  # of ml_collections
@pytest.mark.parametrize("text", WRONG)
def test_a_config_that_raises_is_named(text, tmp_path):
    """Wrong: "division by zero" alone, of whatever file."""
    (tmp_path / "wrong.py").write_text(text)
    read = plan.named(config_flags.config_flags.ConfigFileFlagParser("config").parse)
    with pytest.raises(ValueError, match=re.escape(f"{tmp_path}/wrong.py{WRONG[text]}")):
        read(f"{tmp_path}/wrong.py:arg")


@pytest.mark.parametrize(
    "options, message",
    [
        (["--config=nope.py"], "the file nope.py does not exist"),
        (
            ["--config=configs/base_64.py:tiny", "--text_encoder=xl"],
            "--config and --text_encoder are both given",
        ),
    ],
)
def test_what_is_planned_is_one_thing_that_exists(options, message):
    """Wrong: a file that is not there called "an earlier failure to load"; two things to plan
    called none.
    """
    done = subprocess.run(
        [sys.executable, "-m", "imagen_jax.plan", "--topology=v5e-4", *options],
        cwd=tiny.ROOT,
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert (
        done.returncode == 2
        and message in done.stderr
        and done.stderr.startswith("error: ")
        and done.stderr.count("\n") == 1
    )
