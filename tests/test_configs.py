"""Every config file, in every variant: loads, is locked, describes a network that can be built; the
paper's are what the paper prints.
"""

import importlib
import json
import math
import pathlib
import re
import shlex

import jax
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from imagen_jax import schema, sharding
from imagen_jax.stage import create_stage
from imagen_jax.text_inputs import is_text
from imagen_jax.training import optim, state, step
from launch import sweep
from launch.ablation import plan
from launch.job import read_config

CONFIGS = pathlib.Path(__file__).resolve().parent.parent / "configs"
SMALL = ("demo", "tiny")
OTHERS = {"cascade", "defaults", "saved"}  # not the config of a stage by themselves


def files(folder):
    """The modules of a folder of configs, as names below `configs`."""
    paths = sorted((CONFIGS / folder).glob("[!_]*.py"))
    return [".".join(path.relative_to(CONFIGS).with_suffix("").parts) for path in paths]


def module(name):
    return importlib.import_module(f"configs.{name}")


def variants(name):
    """The arguments that a config's docstring names: `:demo`, or FILE.py:demo in a command."""
    file = "configs/" + name.replace(".", "/") + ".py"
    result = re.findall(rf"(?:[\s`]|{file}):(\w+(?:=\d+)?)", module(name).__doc__)
    return ("", *dict.fromkeys(result))


ABLATIONS = files("ablations")
RECIPES = files("recipes")
GPIC = [name for name in RECIPES if "gpic" in name]
VARIANTS = {name: variants(name) for name in files("") + ABLATIONS + RECIPES if name not in OTHERS}
COUNTS = {
    ("base_64", ""): 2_263_431_171,
    ("base_64", "width=192"): 311_641_603,
    ("base_64", "width=256"): 545_605_123,
    ("base_64", "width=384"): 1_309_677_571,
    ("base_64_efficient", ""): 449_709_059,
    ("sr_256", ""): 473_107_075,
    ("sr_1024", ""): 468_908_675,
    ("recipes.gpic_nano_base_64", ""): 141_626_883,
    ("recipes.gpic_nano_sr_256", ""): 119_531_587,
    ("base_64", "demo"): 3_630_508,
    ("sr_256", "demo"): 3_184_099,
    ("sr_1024", "demo"): 1_432_643,
}
TRACED = ("bert_base", "t5_xxl_clip")  # arms of the text-encoder ablation in make test-slow
ALL = [(name, arg) for name, args in VARIANTS.items() for arg in args]


def resolved(config):
    """The config as a run records and uses it."""
    return json.loads(config.to_json())


def parameters(config):
    """Shapes of the parameters of the stage a config describes."""
    return jax.eval_shape(create_stage(resolved(config)).init, jax.random.key(0))


def count(tree):
    return sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(tree))


def commands(name):
    """The commands that a docstring prints: (program, value of --config, further options)."""
    lines = module(name).__doc__.replace("\\\n", " ").splitlines()
    words = [shlex.split(line)[2:] for line in lines if line.startswith("    python -m ")]
    assert all(command[1] == "--config" for command in words)
    return [(command[0], command[2], command[3:]) for command in words]


def test_variants_are_those_of_the_docstring():
    """Wrong: a variant that is read from a sentence or another config's name, or not at all."""
    assert VARIANTS["base_64"] == ("", "demo", "width=192", "width=256", "width=384", "tiny")
    assert set(VARIANTS["base_64_efficient"]) == {"", *SMALL}
    assert all("tiny" in args for args in VARIANTS.values())
    assert set(COUNTS) <= set(ALL)


@pytest.mark.parametrize("name", [*VARIANTS, "cascade", "saved"])
def test_docstring_commands_are_valid(name, tmp_path, monkeypatch):
    """Wrong: a printed command with a variant, a field or an option that does not exist; a config
    without a command for a CPU below that for the full size.
    """
    for workdir in (tmp_path / "WORKDIR", tmp_path / "runs" / "base"):  # for configs/saved.py
        workdir.mkdir(parents=True)
        config = resolved(module("base_64").get_config("tiny"))
        config["data"]["path"] = "data/emoji"
        (workdir / "config.json").write_text(json.dumps(config))
    (tmp_path / "configs").symlink_to(CONFIGS)
    monkeypatch.chdir(tmp_path)
    printed = commands(name)
    for program, config, options in printed:
        fields = [option for option in options if option.startswith("--config.")]
        if program == "launch.sweep":
            plan(sweep.parse([f"--config={config}", *options])[0])
        elif program == "imagen_jax.sample":
            known = schema.flat(module(name).get_config(config.partition(":")[2]).to_dict())
            assert {
                field.removeprefix("--config.").partition("=")[0] for field in fields
            } <= known.keys()
        else:
            read_config(config, fields)
    full, small = printed[:2]
    if name != "saved":
        assert full[1].endswith(".py") and small[1].endswith((":demo", ":tiny"))
    if name not in OTHERS:
        data = "data/encoders" if name.endswith("text_encoder") else "data/emoji"
        assert f"--config.data.path={data}" in small[2]


@pytest.mark.parametrize("name", [*VARIANTS, "cascade"])
def test_docstring_says_how_to_run_and_what_to_expect(name):
    """Wrong: a config without its command, hardware, expected result or record, and a record that
    is no section of BENCHMARKS.md.
    """
    doc = " ".join(module(name).__doc__.split())
    parts = ["python -m ", "--config configs/" + name.replace(".", "/") + ".py"]
    assert all(part in doc for part in [*parts, "Hardware: ", "Expect: ", "Recorded: "])
    sections = (CONFIGS.parent / "BENCHMARKS.md").read_text(encoding="utf-8").splitlines()
    heads = [line.lstrip("# ") for line in sections if line.startswith("#")]
    for recorded in re.findall(r"BENCHMARKS.md, ([^.]*)", doc):
        names = re.findall(r'"([^"]*)"', recorded)
        assert names and all(any(head.startswith(n) for head in heads) for n in names), recorded


@pytest.mark.parametrize("name, arg", ALL)
def test_config_is_locked(name, arg):
    """Wrong: a config returned unlocked, in which a mistyped field is silently a new one."""
    config = module(name).get_config(arg)
    parts = [config] + [
        config[part]
        for part in ("text", "data", "model", "diffusion", "sampling", "optim", "mesh", "train")
    ]
    for part in parts:
        with pytest.raises((AttributeError, KeyError), match="locked|does not exist"):
            part.batchsize = 1


def test_config_of_an_earlier_run(tmp_path):
    """Wrong: a saved config that is not the run's, that cannot be changed on the command line, or
    whose tuples have become lists.
    """
    config = module("sr_1024").get_config("tiny")
    (tmp_path / "config.json").write_text(json.dumps(resolved(config)))
    saved = module("saved").get_config(str(tmp_path / "config.json"))
    assert (
        saved == config
        and saved.is_locked
        and isinstance(saved.model.widths, tuple)
        and saved.mesh.rules == config.mesh.rules
    )


@pytest.mark.parametrize("name", VARIANTS)
def test_unknown_variant_is_refused(name):
    """Wrong: `:demp` quietly trains the paper's full-size model."""
    with pytest.raises(ValueError, match="demp.*demo"):
        module(name).get_config("demp")


@pytest.mark.parametrize(
    "name, arg",
    [(name, arg) for name, arg in ALL if arg in SMALL and name not in ABLATIONS + RECIPES],
)
def test_small_variant_builds(name, arg):
    """Wrong: a demo or test size whose widths do not divide into groups or heads, or that is no
    longer small.
    """
    assert count(parameters(module(name).get_config(arg))) < (16e6 if arg == "demo" else 3e5)


@pytest.mark.parametrize(
    "name, arg",
    [
        pytest.param(*case, marks=[pytest.mark.slow] * ("width" in case[1] or case[0] in RECIPES))
        for case in COUNTS
    ],
)
def test_parameter_count_is_the_stated_one(name, arg):
    """Wrong: an edit of a network or config that changes the paper's sizes unnoticed, or a
    docstring that states another.
    """
    result = count(parameters(module(name).get_config(arg)))
    assert result == COUNTS[name, arg]
    if not arg:
        stated = f"{result / 1e9:.2f}B" if result >= 1e9 else f"{result / 1e6:.0f}M"
        assert stated in module(name).__doc__


@pytest.mark.parametrize(
    "name, expected",
    {
        "base_64": dict(
            optimizer="adafactor",
            schedule="cosine",
            image_size=64,
            lowres_size=0,
            crop_size=0,
            channels=512,
            multipliers=(1, 2, 3, 4),
            blocks=3,
        ),
        "sr_256": dict(
            optimizer="adam",
            schedule="cosine",
            image_size=256,
            lowres_size=64,
            crop_size=0,
            widths=(128, 256, 512, 1024),
            blocks=(2, 4, 8, 8),
        ),
        "sr_1024": dict(
            optimizer="adam",
            schedule="linear",
            image_size=1024,
            lowres_size=256,
            crop_size=256,
            widths=(128, 256, 512, 1024),
            blocks=(2, 4, 8, 8),
        ),
    }.items(),
)
def test_paper_hyperparameters(name, expected):
    """Wrong: a setting of the demo that leaks into the paper's recipe (section 4.1, listings of
    Appendix F).
    """
    config = module(name).get_config()
    common = dict(
        lr=1e-4,
        warmup=10_000,
        batch_size=2048,
        steps=2_500_000,
        text_drop=0.1,
        percentile=99.5,
        dim=4096,
        dropout=0.0,
        dtype="bfloat16",
    )
    fields = {}
    for part in ("text", "train", "data", "model", "diffusion", "optim"):
        fields |= dict(config[part])
    fields["percentile"] = config.sampling.percentile
    assert {field: fields[field] for field in common | expected} == common | expected


@pytest.mark.parametrize("name", GPIC)
def test_recipe_takes_the_epochs_that_its_docstring_states(name):
    """Wrong: a batch that was changed without the number of steps; a small variant that is not that
    of the config from which the recipe derives.
    """
    config = module(name).get_config()
    assert create_stage(resolved(config)).image_size == config.data.image_size
    epochs, images = {
        "recipes.gpic_base_64": ("one epoch", 100e6),
        "recipes.gpic_sr_256": ("one epoch", 100e6),
        "recipes.gpic_nano_base_64": ("about 10 epochs", 1e6),
        "recipes.gpic_nano_sr_256": ("about 8 epochs", 1e6),
    }[name]
    doc = " ".join(module(name).__doc__.split())
    number = {"one": 1}.get(word := epochs.split()[-2], word)
    assert epochs in doc.lower()
    assert round(config.train.steps * config.data.batch_size / images) == int(number)
    assert f"{config.train.steps:,} steps" in doc
    base = "sr_256" if config.data.lowres_size else "base_64"
    for arg in SMALL:
        small = module(name).get_config(arg).to_dict()
        assert small | {"name": ""} == module(base).get_config(arg).to_dict() | {"name": ""}


def test_buckets_have_the_area_of_the_square():
    """Wrong: sides that the network cannot halve, ratios over the limit, sizes of another area, a
    width in place of a height, a size twice.
    """
    expected = (40, 104), (48, 88), (56, 72), (64, 64), (72, 56), (88, 48), (104, 40)
    assert module("defaults").buckets(64, 8) == expected
    assert module("defaults").buckets(64, 8, limit=1.9) == expected[1:-1]
    assert module("defaults").buckets(64, 64) == ((64, 64),)
    with pytest.raises(ValueError, match="64 pixels need steps that divide it, not 24"):
        module("defaults").buckets(64, 24)


@pytest.mark.parametrize("arg", ("", *SMALL))
def test_bucket_recipes_are_a_cascade(arg):
    """Wrong: a super-resolution stage whose low-res images have other sizes than those that the
    base draws; a recipe that differs from its base in more than the buckets.
    """
    base, sr = (module(f"recipes.buckets_{name}").get_config(arg) for name in ("base_64", "sr_256"))
    stages = [create_stage(resolved(config)) for config in (base, sr)]
    assert tuple(map(stages[1].lowres_of, stages[1].buckets)) == stages[0].buckets
    assert len(base.data.buckets) == (3 if arg else 7)
    for config, name in ((base, "base_64"), (sr, "sr_256")):
        same = module(name).get_config(arg).to_dict()
        data = {"data": same["data"] | {"buckets": config.data.buckets}}
        assert config.to_dict() == same | data | {"name": config.name}


@pytest.mark.parametrize("arg", ("", "demo"))
def test_cascade_sets_what_its_stages_sample_with(arg):
    """Wrong: a cascade that lacks a sampling field of its stages or has one of its own; an unlocked
    or mistyped cascade.
    """
    cascade = module("cascade").get_config(arg)
    for stage, name in {"base": "base_64", "sr_1": "sr_256", "sr_2": "sr_1024"}.items():
        assert cascade[stage].sampling.to_dict() == module(name).get_config(arg).sampling.to_dict()
    with pytest.raises((AttributeError, KeyError), match="locked|does not exist"):
        cascade.base.sampling.guidance = 1.0
    with pytest.raises(ValueError, match="demp.*demo"):
        module("cascade").get_config("demp")


@pytest.mark.slow
@pytest.mark.timeout(600)
@pytest.mark.parametrize("name", ["base_64", "sr_256", "sr_1024"])
def test_full_size_step_traces_on_eight_devices(name):
    """Wrong: a network, a rule or a step that works at test size only; state that is not split over
    `fsdp`; output placed elsewhere than input.
    """
    config = resolved(module(name).get_config())
    fsdp, total, seed = 4, config["train"]["steps"], config["seed"]
    mesh = sharding.make_mesh(config["mesh"] | {"fsdp": fsdp})
    stage = create_stage(config, mesh)
    optimizer = optim.make_optimizer(config["optim"], total)
    rules = [tuple(rule) for rule in config["mesh"]["rules"]]
    abstract, shardings = state.abstract_state(
        stage, optimizer, mesh, rules, config["mesh"]["fsdp_min_elements"]
    )
    rows = sharding.batch_sharding(mesh)
    shapes = stage.batch_shapes(config["data"]["batch_size"], stage.largest_bucket)
    batch = {name: jax.ShapeDtypeStruct(*shape, sharding=rows) for name, shape in shapes.items()}
    train_step = step.make_step(
        stage, optimizer, optim.learning_rate(config["optim"], total), config["optim"], seed
    )
    placed = dict(
        in_shardings=(shardings, rows),
        out_shardings=(shardings, NamedSharding(mesh, PartitionSpec())),
    )
    new_state, metrics = (
        jax.jit(train_step, donate_argnums=0, **placed).trace(abstract, batch).out_info
    )
    as_placed = lambda tree: jax.tree.map(
        lambda leaf: (leaf.shape, leaf.dtype, leaf.sharding.spec), tree
    )
    assert as_placed(new_state) == as_placed(abstract)
    assert metrics["loss"].shape == ()
    table = {row["part"]: row for row in state.bytes_table(abstract, shardings)}
    for part in ("params", "ema"):
        assert table[part]["bytes_per_device"] < 1.02 * table[part]["bytes"] / fsdp


@pytest.mark.parametrize("name, arg", [(name, arg) for name, arg in ALL if name in ABLATIONS])
def test_ablation_changes_fields_that_exist(name, arg):
    """Wrong: an arm that sets a field no network reads, repeats another arm, or only fits one
    variant.
    """
    arms = list(module(name).sweep(arg))
    assert len({arm["name"] for arm in arms}) == len(arms) >= 2
    configs = [apply_arm(name, arg, arm) for arm in arms]
    assert len({json.dumps(resolved(config)) for config in configs}) == len(arms)
    for config in configs:
        create_stage(resolved(config))  # refuses settings that nothing can be drawn with
    if arg == "tiny":
        for network in {
            json.dumps({**resolved(config), "sampling": resolved(configs[0])["sampling"]})
            for config in configs
        }:
            jax.eval_shape(create_stage(json.loads(network)).init, jax.random.key(0))


@pytest.mark.parametrize(
    "arm",
    [
        pytest.param(
            arm, marks=[pytest.mark.slow, *[pytest.mark.long] * (arm["name"] not in TRACED)]
        )
        for arm in module("ablations.text_encoder").sweep()
    ],
    ids=lambda arm: arm["name"],
)
def test_a_train_step_with_each_text_encoder_of_the_paper_is_traced(arm):
    """Wrong: an arm of the paper's ablation whose encoders, widths or pooled vectors do not fit the
    300M model.
    """
    config = resolved(apply_arm("ablations.text_encoder", "", arm))
    config["mesh"]["fsdp"] = 1
    program = step.TrainProgram.create(config, sharding.batch_mesh(jax.devices()))
    state, metrics = jax.eval_shape(program.step, program.abstract, program.batch)
    fields = {name for name in program.batch if is_text(name)}
    pooled = any(config["text"]["pooled_dims"])
    assert len(fields) == 2 * len(config["text"]["encoders"]) + pooled
    assert 2.9e8 < count(state.params) < 3.2e8 and metrics["loss"].shape == ()


def apply_arm(name, arg, arm):
    """The config of one arm; setting a field of another type or one that is not there raises."""
    config = module(name).get_config(arg)
    config.update_from_flattened_dict(
        {key.removeprefix("config."): value for key, value in arm.items() if key != "name"}
    )
    return config
