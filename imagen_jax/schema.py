"""Declares every config field once. All code reads configs through `complete`.

A saved config (of a run, a checkpoint or a picture) may be older than a field. `Field.older` is the
value to assume where the field is absent, so older saved configs stay readable.
docs/config.md lists all fields; imagen_jax/field.py says which values a field accepts.
"""

from collections.abc import Iterable, Mapping
from typing import Any

from imagen_jax.data_fields import DATA, TEXT
from imagen_jax.field import Field, Need, effect_problem, flat, read_section, within, without_effect
from imagen_jax.network_fields import FAMILY_FIELDS, MODEL, WITH_TEXT
from imagen_jax.run_fields import CASCADE_MESH, MESH, TRAIN

Fields = Mapping[str, Any]  # {name: Field, or the Fields of a section}
SEEDS = "[0, 2^32)"  # JAX and the data order use 32-bit seeds; a larger seed would wrap
# Conditions for an effect of other fields.
SUPER_RESOLUTION = Need("data.lowres_size", unless=(0,))
LOGIT_NORMAL = Need("diffusion.density", ("logit_normal",))
ADAM = Need("optim.optimizer", ("adam",))

DIFFUSION = {
    "schedule": Field(
        "Noise schedule log-SNR(t), used by density = uniform and grid = t.",
        str,
        "F.1-F.3",
        choices=("cosine", "linear", "flow"),
        needs=((Need("diffusion.density", ("uniform",)), Need("sampling.grid", ("t",))),),
    ),
    "aug_schedule": Field(
        "Noise schedule log-SNR(t) of the augmentation of the low-res image.",
        str,
        choices=("cosine", "linear", "flow"),
        needs=(SUPER_RESOLUTION,),
        idle=("cosine",),
    ),
    "aug_max": Field(
        "Largest low-res augmentation level in training.",
        float,
        "section 2.4",
        interval="[0, 1]",
        needs=(SUPER_RESOLUTION,),
        idle=(0.0,),
    ),
    "prediction": Field(
        "Output of the network; u = eps - x.", str, "Appendix A", choices=("eps", "x", "v", "u")
    ),
    "text_drop": Field(
        "Probability of dropping the caption in training.",
        float,
        "section 4.1",
        interval="[0, 1]",
        needs=(WITH_TEXT,),
        idle=(0.1, 0.0),
    ),
    "process": Field(
        "Forward process: variance preserving (vp) or the straight flow path (flow).",
        str,
        "Appendix A; flow: Lipman et al. 2023",
        choices=("vp", "flow"),
        older="vp",
    ),
    "density": Field(
        "Distribution of log-SNR in training.",
        str,
        "Appendix A; logit_normal: Esser et al. 2024",
        choices=("uniform", "logit_normal"),
        older="uniform",
    ),
    "density_mean": Field(
        "logit_normal only: mean of logit(t), where t is the time of the flow path.",
        float,
        "Esser et al. 2024",
        older=0.0,
        needs=(LOGIT_NORMAL,),
    ),
    "density_std": Field(
        "logit_normal only: standard deviation of logit(t).",
        float,
        "Esser et al. 2024",
        older=1.0,
        interval="(0, inf)",
        needs=(LOGIT_NORMAL,),
    ),
    "weight": Field(
        "Weight of the squared error.",
        str,
        "Appendix A; min_snr: Hang et al. 2023",
        choices=("none", "min_snr"),
        older="none",
    ),
}

SAMPLING = {
    "method": Field(
        "Sampler.",
        str,
        "Appendix A; dpmpp_2m: Lu et al. 2022",
        choices=("ancestral", "ddim", "dpmpp_2m"),
        resume=True,
    ),
    "steps": Field("Sampling steps.", int, resume=True),
    "gamma": Field(
        "ancestral only: log variance between its lower (0) and upper bound (1).",
        float,
        "Appendix A",
        resume=True,
        needs=(Need("sampling.method", ("ancestral",)),),
        idle=(0.2, 0.0),  # 0 in sr_1024
    ),
    "w": Field(
        "Guidance weight; 1: no guidance.", float, "section 2.2", resume=True, needs=(WITH_TEXT,)
    ),
    "threshold": Field(
        "Thresholding of the predicted clean image x-hat.",
        str,
        "section 2.3",
        choices=("none", "static", "dynamic"),
        resume=True,
    ),
    "percentile": Field(
        "dynamic only: percentile of |x-hat|, 0 to 100.",
        float,
        "Fig. A.10",
        resume=True,
        needs=(Need("sampling.threshold", ("dynamic",)),),
        idle=(99.5,),
    ),
    "aug_level": Field(
        "Low-res augmentation level in sampling, 0 to 1.",
        float,
        "section 2.4",
        resume=True,
        needs=(SUPER_RESOLUTION,),
        idle=(0.0,),
    ),
    "grid": Field(
        "Step spacing: uniform in time (t) or in log-SNR (logsnr), or Karras et al. (karras).",
        str,
        "Appendix A; karras: Karras et al. 2022",
        choices=("t", "logsnr", "karras"),
        older="t",
        resume=True,
    ),
    "grid_logsnr": Field(
        "logsnr and karras only: first and last log-SNR.",
        tuple[float, float],
        "Karras et al. 2022",
        older=(-8.764, 12.429),
        resume=True,
        needs=(Need("sampling.grid", ("logsnr", "karras")),),
    ),
    "grid_rho": Field(
        "karras only: exponent.",
        float,
        "Karras et al. 2022",
        older=7.0,
        resume=True,
        needs=(Need("sampling.grid", ("karras",)),),
    ),
    "w_interval": Field(
        "Guidance interval in log-SNR; outside it w = 1.",
        tuple[float, float],
        "Kynkäänniemi et al. 2024",
        older=(-20.0, 20.0),
        resume=True,
        needs=(WITH_TEXT, Need("sampling.w", unless=(1.0,))),
    ),
}

OPTIM = {
    "optimizer": Field("Optimizer.", str, "section 4.1", choices=("adam", "adafactor")),
    "lr": Field("Learning rate after warm-up.", float, "section 4.1", interval="[0, inf)"),
    "warmup": Field("Steps of linear warm-up.", int, "section 4.1", interval="[0, 2^31)"),
    "decay": Field(
        "Decay of the learning rate after warm-up: none (constant), or cosine to 0 at train.steps.",
        str,
        "F.1-F.3",
        choices=("constant", "cosine"),
    ),
    "beta1": Field(
        "Adam's decay of the first moment.",
        float,
        "F.2, F.3",
        interval="[0, 1)",
        needs=(ADAM,),
        idle=(0.9,),
    ),
    "beta2": Field(
        "Adam's decay of the second moment.",
        float,
        "F.2, F.3",
        interval="[0, 1)",
        needs=(ADAM,),
        idle=(0.999,),
    ),
    "eps": Field(
        "Adam's epsilon.", float, "F.2, F.3", interval="[0, inf)", needs=(ADAM,), idle=(1e-8,)
    ),
    "weight_decay": Field(
        "Weight decay of the kernels; norms, biases and embeddings are not decayed.",
        float,
        "F.1-F.3",
        interval="[0, inf)",
    ),
    "clip": Field(
        "Largest global norm of the gradient; 1e9 disables clipping.", float, interval="(0, inf)"
    ),
    "ema": Field("Decay of the EMA of the parameters.", float, interval="[0, 1)"),
    "accumulation": Field(
        "Gradient accumulation: micro-batches per batch; with dropout, each has its own masks.",
        int,
        resume=("model.dropout", 0.0),
        interval="[1, inf)",
    ),
    "ema_tracks": Field(
        "Decays of additional EMAs.", tuple[float, ...], older=(), interval="[0, 1)"
    ),
}

STAGE: Fields = {
    "name": Field("Name of the stage.", str, resume=True),
    "seed": Field("Seed of parameters, data order and noise.", int, interval=SEEDS),
    "text": TEXT,
    "data": DATA,
    "model": MODEL,  # plus FAMILY_FIELDS[family]
    "diffusion": DIFFUSION,
    "sampling": SAMPLING,
    "optim": OPTIM,
    "mesh": MESH,
    "train": TRAIN,
}

CASCADE_STAGE: Fields = {
    "checkpoint": Field(
        "Workdir, checkpoint, export or embedded:NAME; empty: the cascade ends here.", str
    ),
    "config": Field(
        "The stage's training config, FILE or FILE:VARIANT; plan uses it without a checkpoint.",
        str,
        older="",
    ),
    "sampling": SAMPLING,
}

CASCADE: Fields = {
    "encoder": Field(
        "Text encoder of the prompts: a directory or a name, with @layer=... as in prepare_data;"
        " t5=NAME+clip=DIR for stages with text.encoders.",
        str,
        "section 2.1",
    ),
    "encoder_dtype": Field(
        "Floating-point type of the text encoder.", str, choices=("bfloat16", "float32")
    ),
    "which": Field("Weights to load: ema, params, or ema_1, ema_2, ... (optim.ema_tracks).", str),
    "batch_size": Field(
        "Images per batch on all devices together, rounded up to a multiple of data x fsdp.",
        int,
        interval="[1, inf)",
    ),
    "mesh": CASCADE_MESH,
    "base": CASCADE_STAGE,
    "sr_1": CASCADE_STAGE,
    "sr_2": CASCADE_STAGE,
}
# {field of `sampling`: flag of `evaluate` that overrides it}
EVALUATE_FLAGS = {name: name for name in SAMPLING} | {"method": "sampler"}


def stage_fields(family: str) -> Fields:
    """The fields of a stage whose network has this architecture."""
    return {**STAGE, "model": {**MODEL, **FAMILY_FIELDS[family]}}


def complete(config: Mapping[str, Any], where: str = "config", new: bool = False) -> dict[str, Any]:
    """A stage's config as a plain dict; absent fields get their `older` value.

    Values have their JSON form: tuples become lists, integers in float fields become floats.

    where: the name of the config in error messages.
    new: the config belongs to a new run, not to a saved one, so numbers must be in their intervals,
        and fields without effect must have their defaults.

    Raises ValueError that lists every unknown or missing field, and every wrong type or invalid
    value with the valid ones.
    """
    choices = ", ".join(FAMILY_FIELDS)
    try:
        family = config["model"]["family"]
    except (KeyError, TypeError):
        raise ValueError(f"{where}: model.family is missing; it must be one of {choices}") from None
    if family not in tuple(FAMILY_FIELDS):
        raise ValueError(f"{where}: model.family is {family!r}; it must be one of {choices}")
    return _completed(config, stage_fields(family), where, new)


def complete_cascade(
    config: Mapping[str, Any], where: str = "cascade config", new: bool = False
) -> dict[str, Any]:
    """`complete` for the config of a cascade."""
    completed = _read(config, CASCADE, where, new)
    for name, stage in completed.items() if new else ():
        if isinstance(stage, Mapping) and "sampling" in stage:
            lowres = {"lowres_size": int(name != "base")}
            values = flat({"data": lowres, "sampling": stage["sampling"]})
            if problems := _effect_problems(values, flat({"sampling": SAMPLING})):
                raise ValueError(f"{where}.{name}: {'; '.join(problems)}")
    return completed


def complete_sampling(sampling: Mapping[str, Any], where: str = "config") -> dict[str, Any]:
    """`complete` for the section `sampling` alone."""
    return _completed({"sampling": sampling}, {"sampling": SAMPLING}, where)["sampling"]


def check_effect(config: Mapping[str, Any], changed: Iterable[str], where: str) -> None:
    """Raises ValueError if one of the fields `changed` has no effect in a complete config.

    changed: dotted paths of fields that the caller set; a field that has defaults may have them.
    """
    values, fields = flat(config), flat(stage_fields(config["model"]["family"]))
    if problems := _effect_problems(values, fields, changed):
        raise ValueError(f"{where}: {'; '.join(problems)}")


def _effect_problems(
    values: Mapping[str, Any], fields: Mapping[str, Field], changed: Iterable[str] = ()
) -> list[str]:
    """A message for each field without effect whose value is none of its defaults.

    A field that has no defaults counts only if it is among `changed`; with `changed`, no other
    field counts.
    """
    return [
        effect_problem(path, values, need, fields[path].defaults)
        for path, need in without_effect(values, fields).items()
        if values[path] not in fields[path].defaults
        and (path in changed if changed else fields[path].defaults)
    ]


def _completed(config: Any, fields: Fields, where: str, new: bool = False) -> dict[str, Any]:
    completed = _read(config, fields, where, new)
    if new and (problems := _effect_problems(flat(completed), flat(fields))):
        raise ValueError(f"{where}: {'; '.join(problems)}")
    return completed


def _read(config: Any, fields: Fields, where: str, new: bool) -> dict[str, Any]:
    problems: list[str] = []
    completed = read_section(config, fields, "", new, problems)
    if problems:
        raise ValueError(f"{where}: {'; '.join(problems)}")
    return completed


def check_seed(seed: int, where: str) -> None:
    """Raises ValueError for a seed outside SEEDS.

    where: the name of the seed in the message, such as "--seed".
    """
    if not within(seed, SEEDS):
        raise ValueError(f"{where} {seed} is not a valid seed; give an integer in {SEEDS}")


def may_change(name: str, config: Mapping[str, Any], before: Any, after: Any) -> bool:
    """Whether a resumed run may change a field. It may change any field without effect.

    name: dotted path of the field, such as "train.steps".
    config: the complete config of the run.
    before, after: the values of the field, with tuples for lists.
    """
    fields = flat(stage_fields(config["model"]["family"]))
    if name not in fields:
        return False
    if name in without_effect(flat(config), fields):
        return True
    condition = fields[name].resume
    if isinstance(condition, tuple):
        other, value = condition
        return flat(config)[other] == value
    return condition(before, after) if callable(condition) else condition


def changes(before: Mapping[str, Any], after: Mapping[str, Any]) -> dict[str, tuple[Any, Any]]:
    """{field: (value before, value after)} of all fields that differ."""
    old, new = flat(before), flat(after)
    return {
        path: (old.get(path), new.get(path))
        for path in sorted(old.keys() | new.keys())
        if old.get(path) != new.get(path)
    }
