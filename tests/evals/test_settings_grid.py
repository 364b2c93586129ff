"""`--grid`: what is refused before anything is sampled, and which pictures points share."""

import json
import types
from pathlib import Path

import pytest

from configs import cascade
from imagen_jax import evaluate, schema
from imagen_jax.cascade import run_stages
from imagen_jax.evals import grid_evaluation, settings_grid, suite_evaluation
from imagen_jax.evals.suite_settings import Settings
from imagen_jax.evals.suites import Suite
from imagen_jax.text_inputs import TextInput

STAGES = ["base", "sr_1"]


@pytest.fixture(scope="module")
def config():
    return schema.complete_cascade(json.loads(cascade.get_config("demo").to_json()))


def paths(nodes):
    return [str(node.directory) for node in nodes]


def test_points_are_all_combinations_and_share_sets(config):
    """Catches base pictures that are drawn once per point, super-resolution pictures that two base
    settings share, and settings that reach another stage.
    """
    options = ["base.w=1,1.5", "sr_1.w=4,8", "sr_1.aug_level=0,.1"]
    axes = settings_grid.parse(options, config, STAGES)
    points = settings_grid.points(axes, config, STAGES)
    assert [tuple(point.settings.values()) for point in points[:3]] == [
        (1.0, 4.0, 0.0),
        (1.0, 4.0, 0.1),
        (1.0, 8.0, 0.0),
    ]
    base, sr = settings_grid.levels(points)
    assert paths(base) == ["base_w=1", "base_w=1.5"]
    assert len(set(paths(sr))) == len(points) == 8 and sr == points
    assert str(points[-1].directory) == "base_w=1.5/sr_1_w=8_aug_level=0.1"
    assert [points.index(p) for p in points if p.parent is base[1]] == [4, 5, 6, 7]
    assert points[-1].config["base"]["sampling"]["w"] == 1.5
    assert points[-1].sampling["aug_level"] == 0.1 and points[-1].sampling["w"] == 8.0
    assert base[1].config["sr_1"] == config["sr_1"]


def test_a_grid_over_the_last_stage_has_one_base_set(config):
    """Catches an axis of a later stage in the settings of an earlier one."""
    axes = settings_grid.parse(["sr_1.w=1,4"], config, STAGES)
    base, sr = settings_grid.levels(settings_grid.points(axes, config, STAGES))
    assert paths(base) == ["base"] and len(sr) == 2 and not base[0].settings


def test_a_value_may_be_a_tuple(config):
    """Catches tuples that are cut at their commas."""
    options = ["base.w=3", "base.w_interval=(-8,3),[-5.5,2]"]
    axes = settings_grid.parse(options, config, STAGES)
    assert axes[1].values == ([-8.0, 3.0], [-5.5, 2.0])
    names = paths(settings_grid.levels(settings_grid.points(axes, config, STAGES))[0])
    assert names == ["base_w=3_w_interval=-8..3", "base_w=3_w_interval=-5.5..2"]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["base.w"], "give --grid STAGE.FIELD=V1,V2"),
        (["w=1,2"], "give --grid STAGE.FIELD=V1,V2"),
        (["base.w="], "sampling.w is ''; it must be a finite number"),
        (["base.w=1,x"], "sampling.w is 'x'; it must be a finite number"),
        (["base.w=1,nan"], "must be a finite number"),
        (["base.w=1,2,1.0"], "1 comes twice"),
        (["base.w=1,2", "base.w=3"], "--grid base.w is given twice"),
        (["bas.w=1"], "stage bas is unknown; the stages that run are base, sr_1"),
        (["encoder.w=1"], "stage encoder is unknown"),
        (["sr_2.w=1"], "stage sr_2 is not run"),
        (["base.step=4"], "sampling.step is unknown, did you mean steps"),
        (["base.steps=0"], "sampling.steps is 0; at least one step"),
        (["base.threshold=dynamic,statc"], "it must be one of none, static, dynamic"),
        (["sr_1.aug_level=0,1.5"], "sampling.aug_level is 1.5; it must be from 0 to 1"),
        (["base.aug_level=0,.1"], "sampling.aug_level = 0.0 has no effect with data.lowres_size"),
        (["base.method=ddim", "base.gamma=0,0.2"], "gamma = 0.0 has no effect with"),
        (["base.gamma=.1,.3"], "^--grid base.gamma=0.1: sampling.gamma = 0.1 has no effect with"),
        (["base.w=1,2", "base.w_interval=(-8,3),(-5,2)"], "w_interval = .* has no effect with"),
    ],
)  # fmt: skip
def test_what_cannot_be_drawn_is_refused(config, options, message):
    """Catches a grid that fails after hours of sampling, and two points that are the same."""
    with pytest.raises(ValueError, match=message) as error:
        settings_grid.parse(options, config, STAGES)
    assert str(error.value).startswith("--grid ") and "\n" not in str(error.value)


def test_guidance_of_a_stage_without_text_is_refused(config):
    """Catches points that differ in a weight that the network never reads."""
    axes = settings_grid.parse(["sr_1.w=1,2"], config, STAGES)
    points = settings_grid.points(axes, config, STAGES)
    text, named = TextInput("", 8, 6), TextInput("t5", 8, 6)
    for read in (text, named):
        settings_grid.check_settings(points, axes, {"base": [text], "sr_1": [read]})
    with pytest.raises(ValueError, match="sampling.w = 1.0 has no effect with text.dim = 0"):
        settings_grid.check_settings(points, axes, {"base": [text], "sr_1": []})


def test_stages_without_checkpoint_do_not_run(config):
    """Catches an axis of a stage that the cascade lacks."""
    shorter = config | {"sr_1": config["sr_1"] | {"checkpoint": ""}}
    assert run_stages(shorter, ["base", "sr_1", "sr_2"]) == ["base"]


def test_a_cascade_without_base_is_refused_with_the_flag_of_evaluate(config):
    """Catches advice to give --config, a flag of sample, and an empty list of stages."""
    shorter = config | {"base": config["base"] | {"checkpoint": ""}}
    message = "base has no checkpoint: give --cascade.base.checkpoint=PATH"
    with pytest.raises(ValueError, match=message):
        run_stages(shorter, STAGES, "--cascade")
    given = Settings(shorter, STAGES, Suite("", [], "", {}), 1, 0, {}, [], None)
    with pytest.raises(ValueError, match=message):
        suite_evaluation.evaluate(given, Path("none"))
    with pytest.raises(ValueError, match=message):
        grid_evaluation.evaluate(given, ["base.w=1"], Path("none"))


def test_the_flag_of_one_stage_keeps_its_meaning():
    """Catches --grid=karras with --checkpoint, as ablations of samplers pass it, that is lost, and
    a grid of settings that is taken for a name.
    """
    of = lambda *values: evaluate.sampling_grid(types.SimpleNamespace(grid=list(values)))
    assert of() is None and of("karras") == "karras"
    with pytest.raises(ValueError, match="--grid is 'base.w=1'; it must be one of t, logsnr"):
        of("base.w=1")
    with pytest.raises(ValueError, match="--grid may be repeated with --cascade only"):
        of("t", "karras")


class Flags(dict):
    """The flags of an evaluation of a cascade, as absl gives them; `present` if set here."""

    def __init__(self, **given):
        names = [*evaluate.OF_CHECKPOINT, *evaluate.OF_CASCADE, *schema.EVALUATE_FLAGS.values()]
        values = dict.fromkeys([*names, "checkpoint", "data", "output"], "") | {"seed": 0}
        values |= {"cascade": {"base": {}}, "suite": "data", "data": "d", "stages": ["base"]}
        values |= {"network": ["x"], **given}
        holder = lambda name: types.SimpleNamespace(value=values[name], present=name in given)
        super().__init__({name: holder(name) for name in values})

    def __getattr__(self, name):
        return self[name].value


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"gallery": 99}, "--gallery is for --checkpoint; leave it out"),
        ({"split": "train", "data": "", "suite": "embedded"}, "--split is a split of --data"),
        ({"network": ["x", "y", "x=p"]}, "--network x is given twice"),
        ({"suite_file": "x.txt"}, "--suite data takes its prompts from --data"),
    ],
)
def test_flags_without_effect_on_a_cascade_are_refused(tmp_path, given, message):
    """Catches a flag that is accepted and not used."""
    evaluate.check_flags(Flags(output=str(tmp_path / "out"), split="train"))
    with pytest.raises(ValueError, match=message):
        evaluate.check_flags(Flags(output=str(tmp_path / "out"), **given))


def test_flags_of_an_evaluation_are_refused_with_compare(tmp_path):
    """Catches a comparison of one directory, and settings that are accepted and not used."""
    with pytest.raises(ValueError, match="--compare DIR is needed twice"):
        evaluate.compare(Flags(compare=["a"]))
    for name in ("suite", "gallery", "seed", "grid", "steps"):
        with pytest.raises(ValueError, match=f"--{name} has no effect with --compare"):
            evaluate.compare(Flags(compare=["a", "b"], **{name: 1}))
    with pytest.raises(FileNotFoundError):
        evaluate.compare(Flags(compare=[str(tmp_path), str(tmp_path)]))
