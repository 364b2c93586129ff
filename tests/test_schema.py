"""The schema: complete records, refusals that name the field, every field in a config and back."""

import copy
import functools
import importlib
import json
import subprocess
import sys
from pathlib import Path

import pytest

from configs import defaults
from imagen_jax import cascade, cli, sample, schema
from imagen_jax.diffusion import density, grid, guidance, process, sampler, schedule, weighting
from imagen_jax.evals import history, stage_evaluation
from imagen_jax.field import NEEDED, parse, within
from imagen_jax.models import attention, efficient_unet, remat, unet
from imagen_jax.stage import random_key
from imagen_jax.training import optim
from imagen_jax.weights import checkpoint
from tests import tiny
from tests.evals.toys import settings
from tests.test_configs import ALL, resolved
from tools import make_config_docs

EMBEDDED = ("base_16", "sr_64", "sr_256")
YOUNGER = {
    name: field.older
    for name, field in schema.flat(schema.STAGE).items()
    if field.older is not NEEDED
}
SECTIONS = ("text", "data", "model", "diffusion", "sampling", "optim", "mesh", "train")
NETWORKS = {"unet": unet.UNet, "efficient_unet": efficient_unet.EfficientUNet}
GIVEN = {
    "lowres",
    "constrain",
    "gather",
    "attend",
    "encoders",
    "pooled",
    "parent",
    "name",
}  # of a network, by no config


def config_of(name, arg):
    return importlib.import_module(f"configs.{name}").get_config(arg)


def cascade_config():
    return json.loads(config_of("cascade", "demo").to_json())


def changed(config, **fields):
    """A copy with fields replaced; a dotted name is written with __, a removed field is None."""
    changed_config = copy.deepcopy(config)
    for path, value in fields.items():
        *sections, name = path.split("__")
        inner = changed_config
        for section in sections:
            inner = inner[section]
        inner.pop(name, None)
        if value is not None:
            inner[name] = value
    return changed_config


@pytest.mark.parametrize("name", EMBEDDED)
def test_a_record_of_the_embedded_cascade_completes(name):
    """Wrong: a field added after a checkpoint was written makes it unloadable, or moves a value."""
    _, meta = checkpoint.load_params(cascade.resolve(f"embedded:{name}"))
    saved, result = schema.flat(meta["config"]), schema.flat(schema.complete(meta["config"]))
    assert not YOUNGER.keys() & saved.keys(), "a record that is older than all younger fields"
    assert result == {**saved, **YOUNGER}


def test_the_embedded_cascade_loads():
    """Wrong: a cascade whose config is older than a field, or whose stages are, cannot draw."""
    config = changed(cascade_config(), sr_1__sampling__w_interval=None, base__sampling__grid=None)
    stages = cascade.load_cascade(config)
    assert [loaded.stage.image_size for loaded in stages] == [16, 64, 256]
    assert stages[1].sampling["w_interval"] == [-20.0, 20.0]
    assert stages[0].sampling == schema.complete_cascade(config)["base"]["sampling"]


@pytest.mark.parametrize("name", YOUNGER)
def test_absence_means_the_older_value(name):
    """Wrong: the absence of a field means the newest default, or is an error."""
    section, _, field = name.partition(".")
    config = tiny.config()
    config[section][field] = "something else"
    without = changed(config, **{f"{section}__{field}": None})
    result = schema.complete(without)[section][field]
    assert schema.flat({"field": result})["field"] == YOUNGER[name]
    assert config[section][field] == "something else", "the config itself is not changed"


def test_values_are_those_of_json():
    """Wrong: a config in memory differs from its own record, so a resume or --follow is refused."""
    config = tiny.config(optim__lr=1, model__multipliers=(1, 2), mesh__rules=((".*", "fsdp"),))
    result = schema.complete(config)
    assert json.loads(json.dumps(result)) == result == schema.complete(result)
    assert type(result["optim"]["lr"]) is float and result["optim"]["lr"] == 1.0
    assert result["mesh"]["rules"] == [[".*", "fsdp"]] and result["model"]["multipliers"] == [1, 2]


@pytest.mark.parametrize("name", ["base_64", "sr_256"])
@pytest.mark.parametrize("section", SECTIONS)
def test_a_typo_is_refused_with_the_nearest_name(name, section):
    """Wrong: an unknown field passes in some sections, which then mean something else."""
    config = tiny.config(name)
    for field in config[section]:
        if (section, field) == ("model", "family"):
            continue
        typo = field + "z"
        wrong = changed(config, **{f"{section}__{typo}": 1})
        message = f"{section}.{typo} is unknown, did you mean {section}.{field}?"
        with pytest.raises(ValueError) as error:
            schema.complete(wrong)
        assert str(error.value) == f"config: {message}"


@pytest.mark.parametrize(
    "change, message",
    [
        (dict(nmae="x"), "nmae is unknown, did you mean name?"),
        (dict(seed=None), "seed is missing"),
        (dict(train=None), "train is missing"),
        (dict(mesh=3), "mesh is 3; it must have the fields data, fsdp"),
        (dict(sampling__w=None), "sampling.w is missing"),
        (dict(optim__lr="fast"), "optim.lr is 'fast'; it must be a finite number"),
        (dict(optim__lr=True), "optim.lr is True; it must be a finite number"),
        (dict(train__steps=8.0), "train.steps is 8.0; it must be an integer"),
        (dict(train__steps=True), "train.steps is True; it must be an integer"),
        (dict(data__flip=1), "data.flip is 1; it must be a boolean"),
        (dict(name=3), "name is 3; it must be a string"),
        (dict(data__caption="best"), "data.caption is 'best'; it must be one of random, first"),
        (dict(optim__decay="step"), "optim.decay is 'step'; it must be one of constant, cosine"),
        (dict(model__blocks=[1]), "model.blocks is [1]; it must be an integer"),
        (dict(model__attention=[0, 1]), "model.attention is [0, 1]; it must be a tuple of bool"),
        (dict(model__widths=[1]), "model.widths is unknown"),
        (dict(model__family="vit"), "model.family is 'vit'; it must be one of unet, efficient"),
        (dict(model__family=None), "model.family is missing; it must be one of unet, efficient"),
        (dict(sampling__grid_logsnr=[1.0]), "it must be a tuple of 2 numbers"),
        (dict(optim__ema_tracks=[0.9, "x"]), "it must be a tuple of numbers"),
        (dict(mesh__rules="fsdp"), "mesh.rules is 'fsdp'; it must be a tuple"),
        (dict(data__mixture=[["a"]]), "it must be a tuple of tuples of a string, a finite number"),
    ],
)
def test_a_wrong_value_is_refused(change, message):
    """Wrong: a wrong type, choice or section is found hours later, or never."""
    with pytest.raises(ValueError) as error:
        schema.complete(changed(tiny.config(), **change), "RECORD")
    assert str(error.value).startswith("RECORD: ") and message in str(error.value)


OUTSIDE = {
    "seed": [-1, 2**32],
    "text.dims": [[0]],
    "text.lengths": [[0], [99999999999]],
    "text.pooled_dims": [[-1]],
    "text.drops": [[0.1, 1.5]],
    "data.text_length": [0, 99999999999],
    "data.buckets": [[[8, 0]], [[8, 8], [99999999999999999999, 8]]],
    "data.view_scale": [[0.0, 1.0], [0.5, 1.5]],
    "data.batch_size": [0, -8],
    "data.workers": [-1],
    "data.cache_mib": [-1],
    "data.shard_cache_gib": [0.0, -1.0],
    "model.dropout": [1.0, -0.1],
    "diffusion.text_drop": [1.5, -0.1],
    "diffusion.aug_max": [1.5, -0.1],
    "diffusion.density_std": [0.0],
    "optim.lr": [-1.0],
    "optim.warmup": [-1],
    "optim.weight_decay": [-0.1],
    "optim.clip": [0.0],
    "optim.beta1": [1.0],
    "optim.ema": [1.0, 1.5],
    "optim.ema_tracks": [[0.9, 1.5]],
    "optim.accumulation": [0],
    "train.steps": [0, 2**31],
    "train.log_every": [0],
    "train.sample_every": [-1],
    "train.sample_rows": [0],
    "train.validate_every": [-1],
    "train.validate_rows": [1],
    "train.save_every": [0],
    "train.keep": [0],
    "train.keep_every": [-1],
    "train.keep_best": [-1],
    "train.fast_every": [-1],
    "train.max_skips": [0],
    "train.spike_factor": [-1.0],
}


@pytest.mark.parametrize("name", OUTSIDE)
def test_a_new_run_refuses_a_number_outside_its_interval(name):
    """Wrong: a seed of 2^32 trains as seed 0 does, a count wraps around, a share above 1 is cut;
    and a record of such a run that cannot be evaluated any more.
    """
    for value in OUTSIDE[name]:
        config = changed(tiny.config(), **{name.replace(".", "__"): value})
        with pytest.raises(ValueError) as error:
            schema.complete(config, "--config", new=True)
        assert str(error.value).startswith(f"--config: {name} is {value!r}; it must be ")
        assert schema.flat(schema.complete(config))[name] is not None
    ends = changed(tiny.config(), seed=2**32 - 1, optim__ema=0.0, diffusion__text_drop=1.0)
    assert schema.complete(ends, new=True) == schema.complete(ends)


@pytest.mark.parametrize("seed", [-1, 2**32])
def test_every_seed_is_checked(seed):
    """Wrong: a seed that wraps in evaluate or in code that calls the package."""
    message = f"{seed} is not a valid seed"
    with pytest.raises(ValueError, match=f"--seed {message}; give an integer in"):
        settings(seed=seed)
    with pytest.raises(ValueError, match=message):
        random_key(seed)
    assert random_key(2**32 - 1) is not None and settings(seed=2**32 - 1).seed == 2**32 - 1


def test_every_interval_is_tested():
    """Wrong: an interval without a number that it refuses in the test above."""
    fields = schema.flat(schema.STAGE)
    sizes = {f"data.{name}" for name in ("image_size", "lowres_size", "crop_size")}
    declared = {name for name, field in fields.items() if field.interval}
    assert declared - sizes - {"text.dim", "optim.beta2", "optim.eps"} == OUTSIDE.keys()


@pytest.mark.parametrize(
    "interval, inside, outside",
    [("[0, 2^32)", [0, 2**32 - 1], [-1, 2**32]), ("(0, inf)", [1e-9, 1e30], [0.0, float("inf")])],
)
def test_an_interval_has_the_ends_it_names(interval, inside, outside):
    """Wrong: an end that is counted in although the bracket is round, or the reverse."""
    assert all(within(number, interval) for number in inside)
    assert not any(within(number, interval) for number in outside)


def test_entries_of_a_tuple_have_choices():
    """Wrong: the kinds of attention are looked at when the network is built."""
    with pytest.raises(ValueError, match="a tuple of none, self, cross, fused"):
        schema.complete(tiny.config("sr_256", model__attention=["none", "fusd"]))


def test_all_problems_are_named_at_once():
    """Wrong: five mistakes take five attempts."""
    with pytest.raises(ValueError) as error:
        schema.complete(changed(tiny.config(), sampling__w=None, sampling__v=1.0, optim__eps="x"))
    result = str(error.value)
    assert all(name in result for name in ("sampling.w is missing", "sampling.v", "optim.eps"))


@pytest.mark.parametrize(
    "change, message",
    [
        (dict(encodr="x"), "encodr is unknown, did you mean encoder?"),
        (dict(sr_2=None), "sr_2 is missing"),
        (dict(base__checkpiont="x"), "base.checkpiont is unknown, did you mean base.checkpoint?"),
        (dict(sr_1__sampling__stesp=3), "sr_1.sampling.stesp is unknown, did you mean sr_1.samp"),
        (dict(sr_1__sampling__method="euler"), "sr_1.sampling.method is 'euler'; it must be one"),
    ],
)
def test_a_wrong_cascade_is_refused(change, message, tmp_path):
    """Wrong: a cascade's config or a picture's record is not looked at, or the stage not named."""
    config = changed(cascade_config(), **change)
    with pytest.raises(ValueError) as error:
        cascade.load_cascade(config)
    assert message in str(error.value)
    record = {name: kind() for name, kind in sample.RECORD.items()} | {"config": config}
    (tmp_path / "picture.json").write_text(json.dumps(record))
    with pytest.raises(ValueError) as error:
        sample.read_record(tmp_path / "picture.json")
    assert "picture.json" in str(error.value) and message in str(error.value)


def test_an_older_picture_is_read(tmp_path):
    """Wrong: --reproduce refuses the record of a picture that is older than a field."""
    config = changed(
        cascade_config(), **{f"base__sampling__{n}": None for n in defaults.ADDED["sampling"]}
    )
    record = {name: kind() for name, kind in sample.RECORD.items()} | {"config": config}
    (tmp_path / "picture.json").write_text(json.dumps(record))
    assert sample.read_record(tmp_path / "picture.json")["config"] == cascade_config()


@pytest.mark.parametrize("name, arg", ALL)
def test_every_field_is_declared_and_every_declared_field_is_in_the_config(name, arg):
    """Wrong: a field that only a config or only the schema knows; it could not be set, or read."""
    config = config_of(name, arg)
    declared = schema.flat(schema.stage_fields(config.model.family))
    assert schema.flat(config.to_dict()).keys() == declared.keys()
    assert schema.complete(resolved(config)) == resolved(config)
    assert cli.stage_config(config) == resolved(config)


@pytest.mark.parametrize("arg", ["", "demo"])
def test_the_cascade_has_the_declared_fields(arg):
    """Wrong: a field of a cascade that only its config or only the schema knows."""
    config = json.loads(config_of("cascade", arg).to_json())
    assert schema.flat(config).keys() == schema.flat(schema.CASCADE).keys()
    assert schema.complete_cascade(config) == config


def test_what_configs_add_is_what_older_records_mean():
    """Wrong: a run started again from an older record trains with a newer default."""
    assert schema.flat(defaults.ADDED) == YOUNGER


def test_an_older_run_can_be_started_again_with_a_younger_field(tmp_path):
    """Wrong: an older record cannot get a younger field, or loses its own value to a default."""
    record = changed(
        resolved(config_of("base_64", "tiny")), sampling__grid=None, optim__ema_tracks=None
    )
    record["sampling"]["grid_rho"] = 3.0
    (tmp_path / "config.json").write_text(json.dumps(record))
    result = config_of("saved", str(tmp_path / "config.json"))
    assert result.sampling.grid == "t" and result.sampling.grid_rho == 3.0
    result.sampling.grid, result.optim.ema_tracks = "karras", (0.99,)
    assert cli.stage_config(result)["optim"]["ema_tracks"] == [0.99]


@pytest.mark.parametrize("family", NETWORKS)
def test_a_network_has_the_fields_of_its_family(family):
    """Wrong: a field of a network that no config can set, or one that no network reads."""
    own = set(NETWORKS[family].__dataclass_fields__) - GIVEN
    assert own | {"family"} == schema.MODEL.keys() | schema.FAMILY_FIELDS[family].keys()


def test_choices_are_those_with_code_behind_them():
    """Wrong: an option with code behind it that the schema refuses, or one that it offers and
    nothing implements.
    """
    known = {
        "diffusion.process": process.ALPHA_SIGMA,
        "diffusion.density": density.DENSITIES,
        "diffusion.weight": weighting.WEIGHTS,
        "sampling.grid": grid.GRIDS,
        "diffusion.prediction": process.PREDICTIONS,
        "diffusion.schedule": schedule.SCHEDULES,
        "diffusion.aug_schedule": schedule.SCHEDULES,
        "sampling.method": sampler.SAMPLERS,
        "sampling.threshold": guidance.THRESHOLDS,
        "model.pooling": attention.POOLINGS,
        "model.remat": remat.KINDS,
    }
    fields = schema.flat(schema.STAGE)
    assert {name: set(fields[name].choices) for name in known} == {
        n: set(c) for n, c in known.items()
    }
    for optimizer in fields["optim.optimizer"].choices:
        for decay in fields["optim.decay"].choices:
            settings = tiny.config(optim__optimizer=optimizer, optim__decay=decay)["optim"]
            optim.make_optimizer(settings, 10)
    families = schema.FAMILY_FIELDS
    assert set(families["unet"]["res_block"].choices) == set(unet.RES_BLOCKS)
    assert set(families["efficient_unet"]["attention"].choices) == {"none", *attention.KINDS}


def test_what_a_resume_may_change():
    """Wrong: a resume mixes two experiments, or refuses a change of where a run computes."""
    # Two mixtures with other weights.
    may_change = functools.partial(
        schema.may_change, before=(("a", 1.0),), after=(("a", 1.0), ("b", 1.0))
    )
    config = schema.complete(tiny.config())
    free = {name for name in schema.flat(config) if may_change(name, config)}
    sections = {n for n in schema.flat(config) if n.split(".")[0] in ("mesh", "train", "sampling")}
    alone = {"name", "model.remat", "data.path", "data.workers", "data.cache_mib"}
    alone |= {"data.shard_cache_dir", "data.shard_cache_gib"}
    idle = {f"diffusion.{n}" for n in ("aug_schedule", "aug_max", "density_mean", "density_std")}
    idle |= {f"text.{n}" for n in ("dims", "lengths", "pooled_dims", "drops", "online_encoder")}
    assert free == sections | alone | idle | {"optim.accumulation", "data.view_scale"}
    assert not may_change("encoder.dim", config)
    cosine, dropout = tiny.config(optim__decay="cosine"), tiny.config(model__dropout=0.1)
    assert not may_change("train.steps", cosine)
    assert not may_change("optim.accumulation", dropout)


@pytest.mark.parametrize(
    "field, text, value",
    [
        ("method", "ddim", "ddim"),
        ("steps", "12", 12),
        ("w", "3", 3.0),
        ("w", "1e-1", 0.1),
        ("w_interval", "(-5.5, 3)", [-5.5, 3.0]),
        ("w_interval", "-5.5,3", [-5.5, 3.0]),
        ("grid_logsnr", "[-8.0, 12.0]", [-8.0, 12.0]),
    ],
)
def test_a_flag_gives_the_value_of_the_field(field, text, value):
    """Wrong: a flag whose value differs in form from a record's, so --follow never continues."""
    parsed = parse(text, schema.SAMPLING[field])
    assert parsed == value and type(parsed) is type(value)


@pytest.mark.parametrize(
    "field, text",
    [
        ("w", "x"),
        ("steps", "2.5"),
        ("steps", ""),
        ("method", "heun"),
        ("w_interval", "1"),
        ("w_interval", "(1, 2, 3)"),
        ("grid_logsnr", "(1,"),
    ],
)
def test_a_wrong_flag_is_refused(field, text):
    """Wrong: a value that evaluate refuses only after it has loaded the checkpoint."""
    with pytest.raises(ValueError, match="it must be"):
        parse(text, schema.SAMPLING[field])


def test_evaluate_has_a_flag_for_each_sampling_field():
    """Wrong: an ablation of sampling whose option evaluate does not know, found after training."""
    command = [sys.executable, "-m", "imagen_jax.evaluate", "--help"]
    told = subprocess.run(command, capture_output=True, text=True).stdout
    told = " ".join(told.split())
    for name, field in schema.SAMPLING.items():
        assert f"--{schema.EVALUATE_FLAGS[name]}: {field.meaning}" in told
    assert schema.EVALUATE_FLAGS["method"] == "sampler" and schema.EVALUATE_FLAGS["w"] == "w"


def test_a_line_older_than_a_setting_continues(tmp_path, monkeypatch):
    """Wrong: --follow ends in a KeyError, or a curve of two measurements in one file."""
    monkeypatch.setattr(
        "imagen_jax.evals.stage_evaluation.open_once",
        lambda path, place: type("P", (), {"hash": "h"}),
    )
    numbers = {"rows": 5, "seed": 0}
    older = {
        n: v for n, v in tiny.config()["sampling"].items() if n not in defaults.ADDED["sampling"]
    }
    line = {"config": {"sampling": older}, "sampling": older | {"w": 3.0}, **numbers}
    line |= {"data": {"manifest_hash": "h"}, "checkpoint": {"which": "ema"}}
    record = tmp_path / history.FILE
    record.write_text(json.dumps({"provenance": line}) + "\n")

    def check(numbers=numbers, **sampling):
        stage_evaluation.Evaluator("d", "ema", [], numbers, sampling).check_continues(record)

    check(w=3.0)
    check(w=3.0, grid="t", w_interval=[-20.0, 20.0])
    with pytest.raises(ValueError, match="sampling: "):
        check(w=3.0, grid="karras")
    with pytest.raises(ValueError, match="bins: not recorded, now 10"):
        check(numbers | {"bins": 10}, w=3.0)


def test_the_list_of_fields_is_current():
    """Wrong: docs/config.md tells of fields, values or meanings that are no more."""
    path = Path(make_config_docs.PATH)
    text = make_config_docs.text()
    assert path.read_text(encoding="utf-8") == text, "run python -m tools.make_config_docs"
    names = [n.rpartition(".")[2] for n in schema.flat(schema.STAGE)]
    assert all(f"| `{name}` |" in text for name in names)


def test_a_cascade_older_than_its_mesh_uses_all_devices():
    """Catches a record of a picture that no longer reproduces because it lacks a new section."""
    config = cascade_config()
    whole = schema.complete_cascade(config)
    older = {name: value for name, value in config.items() if name != "mesh"}
    assert schema.complete_cascade(older) == whole
    assert whole["mesh"] == {"data": -1, "fsdp": 1, "model": 1, "spatial": 1}
    with pytest.raises(ValueError, match=r"mesh.dta is unknown, did you mean mesh.data\?"):
        schema.complete_cascade(config | {"mesh": {"dta": 2}})
