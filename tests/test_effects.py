"""Fields without effect: a new run, cascade or arm may not set them, and old records may."""

import pytest

from imagen_jax import cascade, schema
from imagen_jax.evals import stage_evaluation
from imagen_jax.field import any_of, read
from imagen_jax.stage import check_interval, create_stage
from tests import tiny
from tests.test_schema import cascade_config, changed

SR = {"data__lowres_size": 8, "data__image_size": 16}
NO_TEXT = {"text__dim": 0, "model__cond_dim": 0}
# (fields whose value has no effect, fields with which it has one)
IDLE = [
    ({"data__caption": "first", **NO_TEXT}, {"text__dim": 8}),
    ({"model__pooling": "mean", **NO_TEXT}, {"text__dim": 8}),
    ({"diffusion__text_drop": 0.3, **NO_TEXT}, {"text__dim": 8}),
    ({"text__dims": [8]}, {"text__encoders": ["t5"]}),
    ({"text__lengths": [8]}, {"text__encoders": ["t5"]}),
    ({"text__pooled_dims": [8]}, {"text__encoders": ["t5"]}),
    ({"text__drops": [0.5]}, {"text__encoders": ["t5"]}),
    ({"text__online": True, **NO_TEXT}, {"text__dim": 8}),
    ({"text__online_encoder": "t5_tiny"}, {"text__online": True}),
    ({"data__view_scale": [0.5, 1.0]}, {"data__view": "random_crop"}),
    ({"diffusion__aug_schedule": "linear"}, SR),
    ({"diffusion__aug_max": 0.5}, SR),
    ({"diffusion__density_mean": 0.5}, {"diffusion__density": "logit_normal"}),
    ({"diffusion__density_std": 0.5}, {"diffusion__density": "logit_normal"}),
    ({"sampling__gamma": 0.5, "sampling__method": "ddim"}, {"sampling__method": "ancestral"}),
    (
        {"sampling__percentile": 95.0, "sampling__threshold": "static"},
        {"sampling__threshold": "dynamic"},
    ),
    ({"sampling__aug_level": 0.2}, SR),
    ({"sampling__grid_logsnr": [-8.0, 8.0]}, {"sampling__grid": "logsnr"}),
    ({"sampling__grid_rho": 5.0}, {"sampling__grid": "karras"}),
    ({"sampling__w_interval": [-2.0, 2.0], "sampling__w": 1.0}, {"sampling__w": 2.0}),
    ({"optim__beta1": 0.5, "optim__optimizer": "adafactor"}, {"optim__optimizer": "adam"}),
    ({"optim__beta2": 0.5, "optim__optimizer": "adafactor"}, {"optim__optimizer": "adam"}),
    ({"optim__eps": 0.5, "optim__optimizer": "adafactor"}, {"optim__optimizer": "adam"}),
    ({"train__validate_rows": 8}, {"train__validate_every": 2}),
    ({"train__keep_best": 2}, {"train__validate_every": 2}),
    ({"train__best_by": "ema/loss"}, {"train__keep_best": 1, "train__validate_every": 2}),
    ({"train__fast_dir": "/tmp/fast"}, {"train__fast_every": 2}),
    ({"train__max_skips": 3}, {"train__on_bad_step": "skip"}),
    ({"train__on_spike": "skip"}, {"train__spike_factor": 4.0}),
]
ANY_IDLE = {"model.pool_heads", "diffusion.schedule", "sampling.w", "train.sample_rows"}


@pytest.mark.parametrize("idle, effect", IDLE, ids=[next(iter(idle)) for idle, _ in IDLE])
def test_a_value_without_effect_is_refused(idle, effect):
    """Wrong: a setting that changes nothing passes, one that changes something or the default is
    refused, or a record with such a value cannot be read.
    """
    path = next(iter(idle)).replace("__", ".")
    config = tiny.config(**idle)
    with pytest.raises(ValueError) as error:
        schema.complete(config, "--config", new=True)
    assert str(error.value).startswith(f"--config: {path} = ")
    assert schema.flat(schema.complete(config)) == schema.flat(config)
    default = schema.flat(schema.STAGE)[path].defaults[0]
    for changes in ({path.replace(".", "__"): default}, effect):
        schema.complete(tiny.config(**idle | changes), new=True)
    if schema.flat(schema.STAGE)[path].resume is not True:
        assert schema.may_change(path, schema.complete(config), 0, 1)
        assert not schema.may_change(path, schema.complete(tiny.config(**idle | effect)), 0, 1)


def test_every_need_is_tested():
    """Wrong: a field whose declared condition no test checks; a default of the wrong type."""
    fields = schema.flat(schema.STAGE)
    declared = {path for path, field in fields.items() if field.needs}
    assert declared - ANY_IDLE == {next(iter(idle)).replace("__", ".") for idle, _ in IDLE}
    assert not any(fields[path].defaults for path in ANY_IDLE)
    others = [o for path in declared for n in fields[path].needs for o in any_of(n)]
    assert {other.field for other in others} <= fields.keys()
    for path in declared:
        values = [schema.flat({"v": read(v, fields[path])})["v"] for v in fields[path].defaults]
        assert tuple(values) == fields[path].defaults


def test_the_message_names_both_fields():
    """Wrong: a refusal that does not say what the value depends on, or what to do."""
    found = []
    for idle in (dict(sampling__grid_rho=5.0), dict(diffusion__aug_max=0.5)):
        with pytest.raises(ValueError) as error:
            schema.complete(tiny.config(**idle), "FILE", new=True)
        found.append(str(error.value))
    assert found == [
        'FILE: sampling.grid_rho = 5.0 has no effect with sampling.grid = "t"; set sampling.grid ='
        ' "karras", or omit it (default 7.0)',
        "FILE: diffusion.aug_max = 0.5 has no effect with data.lowres_size = 0; change"
        " data.lowres_size, or omit it (default 0.0)",
    ]


def test_a_changed_field_without_effect_is_refused_whatever_its_value():
    """Wrong: an arm that repeats another one under a new name; and one that is refused because one
    of two conditions fails.
    """
    karras = {"diffusion__density": "logit_normal", "sampling__grid": "karras"}
    config = schema.complete(tiny.config(**karras, diffusion__schedule="linear"), new=True)
    with pytest.raises(ValueError, match="arm a: diffusion.schedule = .* and sampling.grid = "):
        schema.check_effect(config, ["diffusion.schedule", "sampling.grid"], "arm a")
    for name in karras:
        one = {field: value for field, value in karras.items() if field != name}
        config = schema.complete(tiny.config(**one, diffusion__schedule="linear"))
        schema.check_effect(config, ["diffusion.schedule"], "arm a")


@pytest.mark.parametrize(
    "field, value", [("base__sampling__grid_rho", 5.0), ("base__sampling__aug_level", 0.1)]
)
def test_a_new_cascade_refuses_values_without_effect(field, value):
    """Wrong: a cascade's settings that change nothing pass, or a picture's record is refused."""
    config = changed(cascade_config(), **{field: value})
    with pytest.raises(ValueError, match=r"--config.base: sampling\."):
        schema.complete_cascade(config, "--config", new=True)
    assert schema.complete_cascade(config) == config
    super_resolution = changed(cascade_config(), sr_1__sampling__aug_level=0.3)
    assert schema.complete_cascade(super_resolution, new=True) == super_resolution


SECTION = tiny.config()["sampling"] | {"w": 3.0, "steps": 4}


@pytest.mark.parametrize(
    "options, message",
    [
        (dict(w_interval=[-2.0, 2.0]), None),
        (dict(w_interval=[-20.0, -19.0]), None),  # the first level
        (
            dict(w_interval=[18.0, 19.0]),
            r"\(18.0, 19.0\) contains none of the 4 log-SNRs .* -20 to ",
        ),
        (dict(w_interval=[-20.0, 19.0]), "contains all of the 4 log-SNRs"),
        (dict(w_interval=[-20.0, 20.0]), None),
        (dict(w_interval=[18.0, 19.0], w=1.0), None),  # the schema refuses it
        (
            dict(w_interval=[-20.0, -9.0], grid="karras"),
            "contains none of the 4 .* -8.764 to 12.43",
        ),
        (dict(w_interval=[-20.0, -11.0], schedule="linear"), "contains none of the 4"),
    ],
)
def test_a_guidance_interval_that_no_level_tells_apart_is_refused(options, message):
    """Wrong: an interval beside all noise levels, which disables guidance, or around all of them;
    a refusal of an interval that holds some; levels of another grid or schedule.
    """
    options = SECTION | options
    schedule = options.pop("schedule", "cosine")
    if message is None:
        check_interval(options, schedule)
        return
    with pytest.raises(ValueError, match=message):
        check_interval(options, schedule)


def test_the_stages_of_a_new_cascade_are_checked():
    """Wrong: an interval of a later stage that no level of its own grid lies in."""
    stage = create_stage(tiny.config(diffusion__schedule="linear"))
    given = {}, {}, print, (8, 8)
    loaded = lambda **change: cascade.LoadedStage(stage, {}, {}, SECTION | change, *given)
    cascade.check_intervals([loaded(), loaded(w_interval=[-10.0, 2.0])])
    with pytest.raises(ValueError, match="contains none of the 4 log-SNRs"):
        cascade.check_intervals([loaded(), loaded(w_interval=[-20.0, -11.0])])


@pytest.mark.parametrize(
    "flags, message",
    [
        (dict(grid_rho=5.0), "the flags: sampling.grid_rho = 5.0 has no effect with"),
        (dict(gamma=0.5, method="ddim"), "the flags: sampling.gamma = 0.5 has no effect with"),
        (dict(w_interval=[18.0, 19.0]), "contains none of the 4 log-SNRs"),
    ],
)
def test_a_flag_of_evaluate_without_effect_is_refused(flags, message):
    """Wrong: a flag that changes nothing passes, or one is found after the rows are read."""
    numbers = dict(rows=4, samples=4, gallery=4, bins=2, batch_size=4, seed=0, lowres_from="")
    meta = {"config": schema.complete(tiny.config())}
    with pytest.raises(ValueError, match=message):
        stage_evaluation.Evaluator("nowhere", "ema", [], numbers, flags)._prepare(meta, {})


def test_a_flag_of_evaluate_may_repeat_what_has_no_effect():
    """Wrong: a sweep that passes all settings of its file, or a record of an earlier version with a
    value without effect, cannot be evaluated.
    """
    numbers = dict(rows=4, samples=4, gallery=4, bins=2, batch_size=4, seed=0, lowres_from="")
    meta = {"config": schema.complete(tiny.config(sampling__grid_rho=5.0))}
    flags = dict(grid_rho=5.0, method="ddim", gamma=0.2, percentile=99.5, threshold="static")
    with pytest.raises(ValueError, match="nowhere"):  # the data, which are read after the check
        stage_evaluation.Evaluator("nowhere", "ema", [], numbers, flags)._prepare(meta, {})
