"""The plan of a cascade: evaluations, FLOPs, memory, times and their report."""

import json
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import pytest

from imagen_jax import cascade, cli, plan, schema, sharding
from imagen_jax.hardware import chips, topology
from imagen_jax.models.attention_kernel import flash_attend
from imagen_jax.planning import cost, sample_cost, sample_plan, sample_report, whole_step
from imagen_jax.stage import create_stage
from imagen_jax.text_inputs import TextInput
from tests import tiny

NAMES = {"base": "base_64", "sr_1": "sr_256", "sr_2": "sr_1024"}
V5E, H100 = chips.by_name("v5e"), chips.by_name("h100")
SUMS = {cost.MATRIX: 2.0, cost.COPY: 1.0, "unestimated": 0.3, "bytes": 8e12}
GUIDED = SUMS | {cost.MATRIX: 6.0, "overlapped": 1.0, "exposed": 0.5}
COMPILED = {"peak": 1, "guided": GUIDED, "plain": SUMS}


def stage_config(name: str) -> dict:
    return schema.complete(tiny.config(NAMES.get(name, name)))


def cascade_config(**sampling) -> dict:
    """A cascade of the tiny configs, which are named like their stages."""
    stage = lambda name: {
        "checkpoint": "",
        "config": name,
        "sampling": stage_config(name)["sampling"] | {"steps": 4, "w": 3.0} | sampling,
    }
    return schema.complete_cascade(
        {
            "encoder": "t5_tiny",
            "encoder_dtype": "bfloat16",
            "which": "ema",
            "batch_size": 3,
            "mesh": {"data": -1, "fsdp": 1, "model": 1, "spatial": 1},
            **{name: stage(name) for name in NAMES},
        }
    )


def only_base(config: dict) -> dict:
    return config | {"sr_1": config["sr_1"] | {"config": ""}}


def mesh(fsdp: int = 1):
    return sharding.make_mesh({"data": -1, "fsdp": fsdp, "model": 1, "spatial": 1})


@pytest.mark.parametrize(
    "change, expected",
    [
        ({"w": 1.0}, (9, 0)),
        ({"w": 3.0}, (9, 9)),
        ({"w": 3.0, "w_interval": (-2.0, 2.0)}, (9, 2)),
    ],
)
def test_evaluations(change, expected):
    """Catches guidance counted with w = 1 or outside of its interval, and one evaluation more than
    there are noise levels.
    """
    stage = create_stage(stage_config("base"))
    sampling = stage.sampling | {"steps": 9, "grid": "logsnr", "grid_logsnr": (-8.0, 8.0)} | change
    assert sample_cost.evaluations(sampling, stage) == expected


def test_flops_are_those_of_full_images_without_the_text():
    """Catches FLOPs of a training crop, and text projected at every evaluation."""
    config = stage_config("sr_2")
    whole = config | {"data": config["data"] | {"crop_size": 0}}
    size = (config["data"]["image_size"],) * 2
    flops = sample_cost.evaluation_flops(config, size)
    assert flops == sample_cost.evaluation_flops(whole, size)
    longer = config | {"data": config["data"] | {"text_length": 7}}
    # One more token in the attention itself, and not in the projections.
    assert flops < sample_cost.evaluation_flops(longer, size) < 1.01 * flops


def test_guidance_doubles_the_flops_of_a_stage():
    """Catches FLOPs that do not depend on guidance."""
    find = lambda w: sample_plan.find_parts(only_base(cascade_config(w=w)), mesh(), stage_config)
    parts = {w: find(w)[0] for w in (1.0, 3.0)}
    rows = {
        w: sample_plan.describe(part, mesh(), 8, part.bytes + 800, 0, part.bytes + 400)
        for w, part in parts.items()
    }
    assert rows[3.0]["flops_per_image"] == 2 * rows[1.0]["flops_per_image"] > 0
    # 8 rows on 8 devices need 800 bytes besides the parameters, and 400 are left.
    assert rows[3.0]["largest_batch"] == 0 and not rows[3.0]["fits"]


@pytest.mark.parametrize("limit, largest", [(1300, 16), (1299, 8), (800, 0)])
def test_largest_batch(limit, largest):
    """Catches a batch per device reported as that of all devices, and resident parameters of other
    stages left out.
    """
    assert sample_plan.largest_batch(900, 100, 400, limit, 16, mesh()) == largest


def test_time_of_a_tpu():
    """Catches overlapped collectives added to compute, exposed ones hidden, and the unguided part
    of an interval counted as guided.
    """
    time = sample_cost.batch_time(COMPILED, (2.0, 1.0), 1.0, 1e12, V5E)
    assert time["seconds"] == pytest.approx(6 + 1 + 2 + 0.5) and not time["is_bound"]
    half = sample_cost.batch_time(COMPILED, (2.0, 1.0), 0.5, 1e12, V5E)
    assert half["seconds"] == pytest.approx(4 + 1 + 1.5 + 0.25)
    assert half["kinds_s"][cost.KERNEL] == pytest.approx(1.5)
    slow = COMPILED | {"guided": GUIDED | {"overlapped": 20.0}}
    assert sample_cost.batch_time(slow, (0.0, 0.0), 1.0, 1e12, V5E)["seconds"] == 20.5


@pytest.mark.parametrize(
    "flops, seconds", [(989e12, 8e12 / 3350e9), (4 * 989e12, 4.0)], ids=["bytes", "FLOPs"]
)
def test_time_of_a_gpu_is_a_bound(flops, seconds):
    """Catches a GPU's time reported as an estimate, and a bound that is the smaller of two."""
    time = sample_cost.batch_time(COMPILED, (0.0, 0.0), 1.0, flops, H100)
    assert time["is_bound"] and time["seconds"] == pytest.approx(seconds)


@pytest.mark.parametrize(
    "name, fsdp, rows, smallest, data, batch",
    [
        ("v5e:16x16", 1, 512, "v5e:2x2", 4, 8),
        ("v5e:4x4", 16, 32, "v5e:4x4", 1, 32),
        ("v5e:2x2", 2, 4, "v5e:2x2", 2, 4),
        ("h100-8", 2, 16, "h100:1x2", 1, 4),
    ],
)
def test_a_program_is_compiled_for_the_smallest_topology(name, fsdp, rows, smallest, data, batch):
    """Catches a program with another number of rows or parameter shards per chip."""
    hardware = topology.parse(name)
    sizes = {"data": hardware.chips // fsdp, "fsdp": fsdp, "model": 1, "spatial": 1}
    reduced, found, found_rows = sample_cost.smallest(hardware, sizes, rows)
    assert (str(reduced), found["data"], found_rows) == (smallest, data, batch)
    assert found_rows // (data * fsdp) == rows // hardware.chips


def test_a_cascade_ends_before_the_first_stage_without_a_network():
    """Catches a plan that fails for a cascade of two stages, and stages of different cascades."""
    config = cascade_config()
    find = lambda config: sample_plan.find_parts(config, mesh(), stage_config)
    assert [part.stage.name for part in find(config)] == ["base_tiny", "sr_tiny", "sr_crops_tiny"]
    two = config | {"sr_2": config["sr_2"] | {"config": ""}}
    assert [part.name for part in find(two)] == ["base", "sr_1"]
    with pytest.raises(ValueError, match="base has neither a checkpoint nor a config: give"):
        find(config | {"base": config["base"] | {"config": ""}})
    with pytest.raises(ValueError, match="sr_1: sr_2 expects low-res images of 16 pixels"):
        find(config | {"sr_1": config["sr_1"] | {"config": "sr_2"}})


def test_the_network_is_that_of_the_checkpoint():
    """Catches the field `config` preferred to the checkpoint."""
    config = cascade_config()
    config["base"] |= {"checkpoint": "embedded:base_16", "config": "base"}
    (part,) = sample_plan.find_parts(only_base(config), mesh(), stage_config)
    assert part.stage.name == "base_16" and part.source == "embedded:base_16"
    assert jax.tree.leaves(part.params)[0].__class__ is jax.ShapeDtypeStruct


@pytest.mark.parametrize("arg", ["", "demo"])
def test_the_configs_of_the_cascade_exist(arg, monkeypatch):
    """Catches a cascade config that names a file or a variant that does not exist."""
    from configs import cascade as file

    monkeypatch.chdir(tiny.ROOT)
    config = json.loads(file.get_config(arg).to_json())
    read = {name: plan.read_stage_config(config[name]["config"]) for name in cascade.STAGES}
    for name, stage in read.items():
        assert stage["sampling"] == config[name]["sampling"]


def test_the_config_must_be_that_of_a_cascade():
    """Catches a stage's config read as a cascade's, and a cascade's invalid value accepted."""
    from configs import base_64
    from configs import cascade as file

    with pytest.raises(ValueError, match="is not the config of a cascade"):
        cli.cascade_config(base_64.get_config("tiny"))
    wrong = file.get_config("demo")
    wrong.batch_size = 0
    with pytest.raises(ValueError, match="batch_size"):
        cli.cascade_config(wrong)


def written(is_bound: bool, fits: bool = True) -> dict:
    """A plan of one stage."""
    time = sample_cost.batch_time(COMPILED, (0.0, 0.0), 1.0, 1e12, H100 if is_bound else V5E)
    money = {"images_per_s_per_chip": 0.5, "hours": 2.0, "chip_hours": 8.0, "money": 10.0}
    stage = {
        "stage": "base",
        "name": "base_64",
        "size": [64, 64],
        "steps": 256,
        "evaluations": 256,
        "guided": 256,
        "flops_per_image": 1e15,
        "parameter_bytes": 2**30,
        "other_parameters": 2**29,
        "peak": 4 * 2**30,
        "fits": fits,
        "largest_batch": 12,
        "time": time,
        "cost": money,
    }
    return {
        "topology": "v5e:2x2",
        "platform": "cuda" if is_bound else "tpu",
        "chips": 4,
        "mesh": {"data": 4, "fsdp": 1},
        "batch": 16,
        "pictures": 30_000,
        "level": "default",
        "limit": 16 * 2**30,
        "resident": True,
        "parameters": 3 * 2**29,
        "encoder": {
            "name": "t5",
            "tokens": 128,
            "rows": 16,
            "parts": 1,
            "peak": 9 * 2**30,
            "fits": True,
        },
        "stages": [stage],
        "cost": money,
    }


def test_bounds_are_labelled():
    """Catches a GPU's bound that reads like an estimate, and an estimate marked as a bound."""
    bound, estimate = (sample_report.text(written(is_bound)) for is_bound in (True, False))
    assert "ROOFLINE BOUNDS, not estimates" in bound and "<0.500" in bound and ">2.00" in bound
    assert "ROOFLINE BOUNDS" not in estimate and ">" not in estimate and "<" not in estimate
    assert "10.00 for all pictures at the given price" in estimate
    assert "t5, 16 prompts of 128 tokens: 9.00, fits; freed before sampling" in estimate


def test_advice():
    """Catches a stage that does not fit reported without a batch that would."""
    large = written(False, fits=False)
    assert "DOES NOT FIT" in sample_report.text(large) and not sample_plan.fits(large)
    assert "about 12 images would fit: --config.batch_size=12" in sample_report.text(large)
    large["stages"][0]["largest_batch"] = 0
    assert "no batch size would fit; shard the parameters" in sample_report.text(large)
    assert "batch_size" not in sample_report.text(written(False))


def request(fsdp: int = 1, **sampling) -> str:
    config = stage_config("base")
    config["mesh"]["fsdp_min_elements"] = 8
    sampling = config["sampling"] | {"grid": "logsnr", "grid_logsnr": (-8.0, 8.0)} | sampling
    sizes = {"data": 4 // fsdp, "fsdp": fsdp, "model": 1, "spatial": 1}
    content = {"config": config, "sampling": sampling, "mesh": sizes, "rows": 8, "index": 0}
    content["size"] = [config["data"]["image_size"]] * 2
    return json.dumps(content)


def test_cached_costs_do_not_depend_on_line_numbers():
    """Catches a cache that is lost when a line is added above the call of a Pallas kernel, whose
    body in the lowered text holds files and lines; and one that mistakes a kernel for another.
    """

    def text(body: str, rows: int = 2) -> str:
        q = jnp.zeros((rows, 64, 128), jnp.bfloat16)
        program = jax.jit(lambda q: flash_attend(q, ((q, q, None),), 2)).trace(q)
        config = rf"{{\22custom_call_config\22: {{\22body\22: \22{body}\22, \22a\22: 1}}}}"
        return sample_cost.program_text(program, SimpleNamespace(as_text=lambda: config))

    assert text("TUzvUg==") == text("TUzvUh+/") and "TUzv" not in text("TUzvUg==")
    assert text("TUzvUg==") != text("TUzvUg==", rows=4)


@pytest.mark.slow
def test_costs_of_compiled_programs(tmp_path):
    """Catches a loop body counted once: the time must grow with the number of steps."""
    pytest.importorskip("libtpu", reason="the TPU compiler comes with the extra `tpu`")
    hardware = topology.parse("v5e:2x2")

    def seconds(steps):
        asked = request(steps=steps, w=3.0)
        costs = sample_cost.compiled_cost(asked, str(hardware), whole_step.DEFAULT, str(tmp_path))
        return sample_cost.batch_time(costs, (0.0, 0.0), 1.0, 1.0, hardware.chip)["seconds"]

    few, more, most = (seconds(steps) for steps in (9, 17, 25))
    assert most - more == pytest.approx(more - few, rel=0.02)
    assert more > 1.5 * few


@pytest.mark.slow
def test_chips_along_data_compute_the_same_program(tmp_path):
    """Catches a program of the smallest topology that differs from that of the whole one."""
    pytest.importorskip("libtpu", reason="the TPU compiler comes with the extra `tpu`")
    large = json.loads(request(steps=9, w=3.0))
    large |= {"mesh": large["mesh"] | {"data": 16}, "rows": 32}
    names = {"v5e:2x2": request(steps=9, w=3.0), "v5e:4x4": json.dumps(large)}
    small, whole = (
        sample_cost.compiled_cost(content, name, whole_step.DEFAULT, str(tmp_path))
        for name, content in names.items()
    )
    assert small["guided"] == pytest.approx(whole["guided"], rel=1e-3)
    assert small["peak"] == pytest.approx(whole["peak"], rel=1e-2)


def test_the_encoder_is_planned_with_its_part_of_a_batch(monkeypatch):
    """Catches as many texts on each chip as there are images on all chips."""
    memory = lambda network, topology, dtype, rows, length, cache: {"asked": rows}
    monkeypatch.setattr(sample_plan.encoder_plan, "memory", memory)
    config = cascade_config() | {"batch_size": 64}
    found = sample_plan.encoder_memory(config, topology.parse("v5e:2x2"), 16, "")
    assert found["rows"] == found["asked"] == 16


@pytest.mark.parametrize(
    ("name", "width", "longest"),
    [
        ("google/t5-v1_1-xl", 2048, 128),
        ("google/flan-t5-base", 768, 128),
        ("openai/clip-vit-large-patch14@layer=-1", 768, 77),
        ("t5_tiny", 256, 128),
    ],
)
def test_the_encoder_is_planned_by_its_name(monkeypatch, name, width, longest):
    """Catches a published encoder that is not planned, and a text longer than it reads."""
    memory = lambda network, *args: {"width": network.config.dim, "layer": network.config}
    monkeypatch.setattr(sample_plan.encoder_plan, "memory", memory)
    config = cascade_config() | {"encoder": name}
    found = sample_plan.encoder_memory(config, topology.parse("v5e:2x2"), 128, "")
    assert (found["width"], found["tokens"], found["name"]) == (width, longest, name)
    if "layer" in name:
        assert found["layer"].layer == 12
    unknown = sample_plan.encoder_memory(
        config | {"encoder": "someone/encoder"}, topology.parse("v5e:2x2"), 128, ""
    )
    assert unknown is None


def test_every_named_encoder_is_planned(monkeypatch):
    """Catches named encoders that are left out as unknown, so that the plan fits, and a length of
    another encoder's input.
    """
    fits = {"t5": True, "clip": False}
    memory = lambda network, *args: {
        "fits": fits["clip" if network.config.dim == 768 else "t5"],
        "parts": 1,
        "peak": 2**30,
    }
    monkeypatch.setattr(sample_plan.encoder_plan, "memory", memory)
    inputs = [TextInput("t5", 2048, 64), TextInput("clip", 768, 128)]
    part = object.__new__(sample_plan.Part)
    vars(part).update(stage=SimpleNamespace(texts=inputs))
    config = cascade_config() | {
        "encoder": "t5=google/t5-v1_1-xl+clip=openai/clip-vit-large-patch14"
    }
    rows = sample_plan.encoder_memories(config, [part], topology.parse("v5e:2x2"), "")
    assert {name: row["tokens"] for name, row in rows.items()} == {"t5": 64, "clip": 77}
    whole = written(False) | {"encoder": None, "encoders": rows}
    assert not sample_plan.fits(whole)
    lines = [line for line in sample_report.text(whole).splitlines() if "text encoder" in line]
    assert ["DOES NOT FIT" in line for line in lines] == [False, True]


def test_encoders_that_can_be_planned(tmp_path):
    """Catches a name or a choice that `plan` does not know, and an error without the names."""
    find = sample_plan.encoder_plan.find_network
    assert find("bert-large@layer=3").config.layer == 3
    assert find("t5_tiny").config.dim == 256 and find("google/t5-v1_1-xl").config.dim == 2048
    assert find("t5-11b").config.d_ff == 65_536 and find("clip-bigg").config.activation == "gelu"
    with pytest.raises(
        ValueError, match="'bert' is not one of t5_tiny, small, .*bert-base, .*clip-bigg"
    ):
        find("bert")


def test_the_size_of_the_pictures():
    """Catches a plan of squares for --size, sizes that follow from one stage to the next the wrong
    way round, FLOPs that do not depend on it, and low-res inputs of the square.
    """
    find = lambda size: sample_plan.find_parts(cascade_config(), mesh(), stage_config, size)
    squares, wide = find(None), find((32, 96))
    assert [part.size for part in squares] == [(8, 8), (16, 16), (32, 32)]
    assert [part.size for part in wide] == [(8, 24), (16, 48), (32, 96)]
    row, wide_row = (
        sample_plan.describe(parts[1], mesh(), 8, 1, 0, 1) for parts in (squares, wide)
    )
    assert (row["size"], wide_row["size"]) == ([16, 16], [16, 48])
    assert 2.5 < wide_row["flops_per_image"] / row["flops_per_image"] < 3.5
    _, batch = whole_step.sampling_inputs(wide[1].stage, 2, wide[1].size)
    assert batch["lowres"].shape == (2, 8, 24, 3)
    with pytest.raises(ValueError, match="--size 32x95 .* the nearest are 32x"):
        find((32, 95))
