"""The fields of a config, each declared once. Code that reads a config reads it through `complete`.

A record (a run's config.json, the config of a checkpoint or of a picture) may be older than a
field. Such a field declares the value that its absence means, so that older records stay readable.
docs/config.md lists all fields.
"""

import ast
import dataclasses
import difflib
import math
import typing
from collections.abc import Iterator, Mapping
from typing import Any

NEEDED = object()  # `older` of a field that every record has


@dataclasses.dataclass(frozen=True)
class Field:
    """One field of a config.

    meaning: one sentence.
    kind: int, float, bool, str, tuple[int, ...], tuple[float, float] and the like, or tuple.
    source: where the paper, or another paper, has it; "" where the paper has nothing.
    choices: the valid values, of a tuple the valid entries; () for any.
    older: the value assumed for records written before the field existed.
    resume: whether a resume may change it; (field, value): only while that field has that value.
    flag: the flag of `evaluate` for a sampling field, where it has another name than the field.
    """

    meaning: str
    kind: Any
    source: str = ""
    choices: tuple[str, ...] = ()
    older: Any = NEEDED
    resume: bool | tuple[str, Any] = False
    flag: str = ""


Fields = Mapping[str, Any]  # {name: Field, or the Fields of a section}

TEXT = {
    "dim": Field("Width of the text features; 0: a model without text.", int, "section 2.1"),
}

DATA = {
    "path": Field("Directory made by prepare_data.", str, resume=True),
    "image_size": Field("Side of the images in pixels.", int, "section 2.5"),
    "lowres_size": Field(
        "Side of the low-res input in pixels; 0: a base model.", int, "section 2.5"
    ),
    "crop_size": Field(
        "Side of the training crops in pixels; 0: whole images.", int, "section 2.5"
    ),
    "text_length": Field("Tokens of a caption, padding included.", int),
    "batch_size": Field("Images in a training step, over all devices.", int, "section 4.1"),
    "caption": Field("Which caption of an image is used.", str, choices=("random", "first")),
    "flip": Field("Whether images are mirrored at random.", bool),
    "workers": Field("Processes that read data; 0: threads of the trainer.", int, resume=True),
    "cache_mib": Field("MiB of memory for decoded images; changes no batch.", int, resume=True),
}

MODEL = {
    "family": Field("Kind of network.", str, "F.1, B.1", choices=("unet", "efficient_unet")),
    "cond_dim": Field("Width of the conditioning embedding; 0: a model without text.", int),
    "pooling": Field(
        "How the tokens become one vector.", str, "F.1", choices=("attention", "mean")
    ),
    "pool_heads": Field("Heads of attention pooling.", int),
    "scale_shift": Field("Whether the embedding scales and shifts the norms.", bool, "F.1"),
    "dropout": Field("Dropout rate in residual blocks.", float, "F.1"),
    "dtype": Field("Type of the arithmetic.", str, choices=("bfloat16", "float32")),
    "remat": Field(
        "Arrays that the backward pass computes again.",
        str,
        choices=("none", "matrix", "block"),
        resume=True,
    ),
}

FAMILY_FIELDS = {
    "unet": {
        "channels": Field("Width of the first level.", int, "F.1"),
        "multipliers": Field(
            "Width of each level, in units of `channels`.", tuple[int, ...], "F.1"
        ),
        "blocks": Field("Residual blocks a level.", int, "F.1"),
        "attention": Field("Whether pixels attend to pixels, by level.", tuple[bool, ...], "F.1"),
        "text_attention": Field(
            "Whether pixels attend to text, by level.", tuple[bool, ...], "F.1"
        ),
        "head_channels": Field("Channels of an attention head.", int, "F.1"),
        "res_block": Field(
            "How resolution changes: inside a residual block (biggan) or in a convolution.",
            str,
            "F.1",
            choices=("biggan", "plain"),
        ),
        "patch": Field("Side of the patches folded into channels; 1: none.", int),
    },
    "efficient_unet": {
        "widths": Field("Width of each level.", tuple[int, ...], "F.2, F.3"),
        "blocks": Field("Residual blocks of each level.", tuple[int, ...], "F.2, F.3"),
        "attention": Field(
            "Attention of each level: to pixels (self), text (cross), or both (fused).",
            tuple[str, ...],
            "F.2, F.3",
            choices=("none", "self", "cross", "fused"),
        ),
        "heads": Field("Attention heads.", int, "F.2, F.3"),
        "residual_scale": Field("Factor of each residual sum.", float, "B.1"),
    },
}

DIFFUSION = {
    "schedule": Field(
        "Log-SNR as a function of time, for the density uniform and the grid t.",
        str,
        "F.1-F.3",
        choices=("cosine", "linear", "flow"),
    ),
    "aug_schedule": Field(
        "The same for the noise of the low-res image.", str, choices=("cosine", "linear", "flow")
    ),
    "aug_max": Field("Highest noise level of the low-res image in training.", float, "section 2.4"),
    "prediction": Field(
        "Output of the network; u = eps - x.", str, "Appendix A", choices=("eps", "x", "v", "u")
    ),
    "text_drop": Field("Share of captions dropped in training.", float, "section 4.1"),
    "process": Field(
        "Path by which noise enters: variance preserving (vp) or straight (flow).",
        str,
        "Appendix A; flow: Lipman et al. 2022",
        choices=("vp", "flow"),
        older="vp",
    ),
    "density": Field(
        "How log-SNR is drawn in training.",
        str,
        "Appendix A; logit_normal: Esser et al. 2024",
        choices=("uniform", "logit_normal"),
        older="uniform",
    ),
    "density_mean": Field(
        "Used by logit_normal: mean of its normal variable, in noise time.",
        float,
        "Esser et al. 2024",
        older=0.0,
    ),
    "density_std": Field(
        "Used by logit_normal: standard deviation of its normal variable.",
        float,
        "Esser et al. 2024",
        older=1.0,
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
        flag="sampler",
    ),
    "steps": Field("Sampling steps.", int, resume=True),
    "gamma": Field(
        "Used by ancestral: mix of its two variances, 0 to 1.", float, "Appendix A", resume=True
    ),
    "w": Field("Guidance weight; 1: no guidance.", float, "section 2.2", resume=True),
    "threshold": Field(
        "Thresholding of x-hat.",
        str,
        "section 2.3",
        choices=("none", "static", "dynamic"),
        resume=True,
    ),
    "percentile": Field(
        "Used by dynamic thresholding: percentile of |x-hat|.", float, "Fig. A.10", resume=True
    ),
    "aug_level": Field(
        "Noise level of the low-res image, 0 to 1.", float, "section 2.4", resume=True
    ),
    "grid": Field(
        "Noise levels that the sampler visits: uniform in time or log-SNR, or Karras's.",
        str,
        "Appendix A; karras: Karras et al. 2022",
        choices=("t", "logsnr", "karras"),
        older="t",
        resume=True,
    ),
    "grid_logsnr": Field(
        "Used by the grids logsnr and karras: first and last log-SNR.",
        tuple[float, float],
        "Karras et al. 2022",
        older=(-8.764, 12.429),
        resume=True,
    ),
    "grid_rho": Field(
        "Used by the grid karras: its exponent.",
        float,
        "Karras et al. 2022",
        older=7.0,
        resume=True,
    ),
    "w_interval": Field(
        "Log-SNR interval in which w is used; outside it w = 1.",
        tuple[float, float],
        "Kynkäänniemi et al. 2024",
        older=(-20.0, 20.0),
        resume=True,
    ),
}

OPTIM = {
    "optimizer": Field("Optimizer.", str, "section 4.1", choices=("adam", "adafactor")),
    "lr": Field("Learning rate after warm-up.", float, "section 4.1"),
    "warmup": Field("Steps of linear warm-up.", int, "section 4.1"),
    "decay": Field(
        "Learning rate after warm-up: constant, or a cosine to 0 at train.steps.",
        str,
        "F.1-F.3",
        choices=("constant", "cosine"),
    ),
    "beta1": Field("Adam's decay of the first moment.", float, "F.2, F.3"),
    "beta2": Field("Adam's decay of the second moment.", float, "F.2, F.3"),
    "eps": Field("Adam's epsilon.", float, "F.2, F.3"),
    "weight_decay": Field("Weight decay.", float, "F.1-F.3"),
    "clip": Field(
        "Largest global norm of the gradient; a large number, such as 1e9: no clipping.", float
    ),
    "ema": Field("Decay of the EMA of the parameters.", float),
    "accumulation": Field(
        "Parts in which a batch is computed; with dropout each part has masks of its own.",
        int,
        resume=("model.dropout", 0.0),
    ),
    "ema_tracks": Field(
        "Decays of further EMAs kept beside optim.ema.", tuple[float, ...], older=()
    ),
}

MESH = {
    "data": Field("Devices along `data`; -1: all that are left.", int, resume=True),
    "fsdp": Field("Devices along `fsdp`, which also splits the state.", int, resume=True),
    "model": Field("Devices along `model`, which splits features by rule.", int, resume=True),
    "spatial": Field("Devices along `spatial`, which splits image height.", int, resume=True),
    "fsdp_min_elements": Field("Smallest array that is split over `fsdp`.", int, resume=True),
    "rules": Field(
        "Pairs (regular expression of a path, placement); the first match decides.",
        tuple,
        resume=True,
    ),
}

TRAIN = {
    "steps": Field("Training steps.", int, "section 4.1", resume=("optim.decay", "constant")),
    "log_every": Field("Steps from one row of metrics to the next.", int, resume=True),
    "sample_every": Field("Steps from one sample grid to the next; 0: none.", int, resume=True),
    "sample_rows": Field("Images in a sample grid.", int, resume=True),
    "save_every": Field("Steps from one checkpoint to the next.", int, resume=True),
    "keep": Field("Checkpoints kept.", int, resume=True),
}

STAGE: Fields = {
    "name": Field("Name of the stage.", str, resume=True),
    "seed": Field("Seed of parameters, data order and noise.", int),
    "text": TEXT,
    "data": DATA,
    "model": MODEL,  # and those of its family
    "diffusion": DIFFUSION,
    "sampling": SAMPLING,
    "optim": OPTIM,
    "mesh": MESH,
    "train": TRAIN,
}

CASCADE_STAGE: Fields = {
    "checkpoint": Field("Workdir, checkpoint, export or embedded:NAME; empty: no stage.", str),
    "sampling": SAMPLING,
}

CASCADE: Fields = {
    "encoder": Field("Text encoder: a directory or a name.", str, "section 2.1"),
    "encoder_dtype": Field("Its arithmetic.", str, choices=("bfloat16", "float32")),
    "which": Field("Weights of a checkpoint: ema, params, or ema_1 ... of ema_tracks.", str),
    "batch_size": Field("Images drawn at once.", int),
    "base": CASCADE_STAGE,
    "sr_1": CASCADE_STAGE,
    "sr_2": CASCADE_STAGE,
}

WORDS = {
    int: "an integer",
    float: "a finite number",
    bool: "a boolean",
    str: "a string",
    tuple: "a tuple",
}
EVALUATE_FLAGS = {name: field.flag or name for name, field in SAMPLING.items()}  # field: flag


def stage_fields(family: str) -> Fields:
    """The fields of a stage whose network is of this family."""
    return {**STAGE, "model": {**MODEL, **FAMILY_FIELDS[family]}}


def complete(config: Mapping[str, Any], where: str = "config") -> dict[str, Any]:
    """A stage's config as a plain dict, with the values that an older record means by absence.

    Values come as JSON returns them: tuples as lists, and ints of float fields as floats. Raises
    ValueError for unknown and missing fields, wrong types and values outside their choices, each
    with what was given and what is valid. `where` names the config in the message.
    """
    try:
        family = config["model"]["family"]
    except (KeyError, TypeError):
        choices = ", ".join(FAMILY_FIELDS)
        raise ValueError(f"{where}: model.family is missing; it must be one of {choices}") from None
    if family not in tuple(FAMILY_FIELDS):
        raise ValueError(f"{where}: model.family {_refusal(family, MODEL['family'])}")
    return _completed(config, stage_fields(family), where)


def complete_cascade(config: Mapping[str, Any], where: str = "cascade config") -> dict[str, Any]:
    """`complete` for the config of a cascade."""
    return _completed(config, CASCADE, where)


def complete_sampling(sampling: Mapping[str, Any], where: str = "config") -> dict[str, Any]:
    """`complete` for the section `sampling` alone."""
    return _completed({"sampling": sampling}, {"sampling": SAMPLING}, where)["sampling"]


def _completed(given: Any, fields: Fields, where: str) -> dict[str, Any]:
    problems: list[str] = []
    made = _section(given, fields, "", problems)
    if problems:
        raise ValueError(f"{where}: {'; '.join(problems)}")
    return made


def _section(given: Any, fields: Fields, prefix: str, problems: list[str]) -> dict[str, Any]:
    """`given`, completed; problems found in it are added to the list."""
    if not isinstance(given, Mapping):
        section = prefix.removesuffix(".") or "it"
        problems.append(f"{section} is {given!r}; it must have the fields {', '.join(fields)}")
        return {}
    problems += [_unknown(name, fields, prefix) for name in given if name not in fields]
    made = {}
    for name, field in fields.items():
        path = prefix + name
        if name in given and isinstance(field, Mapping):
            made[name] = _section(given[name], field, f"{path}.", problems)
        elif name in given:
            try:
                made[name] = read(given[name], field)
            except ValueError as error:
                problems.append(f"{path} {error}")
        elif isinstance(field, Mapping) or field.older is NEEDED:
            problems.append(f"{path} is missing")
        else:
            made[name] = read(field.older, field)
    return made


def _unknown(name: str, fields: Fields, prefix: str) -> str:
    near = difflib.get_close_matches(str(name), fields, 1, cutoff=0.5)
    hint = f"did you mean {prefix}{near[0]}?" if near else f"valid are {', '.join(fields)}"
    return f"{prefix}{name} is unknown, {hint}"


def read(value: Any, field: Field) -> Any:
    """A field's value as JSON returns it. Raises ValueError "is ...; it must be ..."."""
    made = _of_kind(value, field.kind)
    entries = made if isinstance(made, list) else [made]
    if made is NEEDED or (field.choices and not set(entries) <= set(field.choices)):
        raise ValueError(_refusal(value, field))
    return made


def _of_kind(value: Any, kind: Any) -> Any:
    """`value` with tuples as lists and ints for floats as floats; NEEDED for another kind."""
    if kind is tuple or typing.get_origin(kind) is tuple:
        return _list(value, typing.get_args(kind))
    if isinstance(value, bool) and kind is not bool:
        return NEEDED
    if kind is float and isinstance(value, (int, float)):
        return float(value) if math.isfinite(value) else NEEDED  # JSON cannot hold it
    return value if isinstance(value, kind) else NEEDED


def _list(value: Any, kinds: tuple[Any, ...]) -> Any:
    """`_of_kind` for a tuple with entries of these kinds; () for any entries."""
    if not isinstance(value, (list, tuple)):
        return NEEDED
    if not kinds:
        return [_list(entry, ()) if isinstance(entry, (list, tuple)) else entry for entry in value]
    kinds = kinds[:1] * len(value) if Ellipsis in kinds else kinds
    if len(kinds) != len(value):
        return NEEDED
    made = [_of_kind(entry, kind) for entry, kind in zip(value, kinds)]
    return NEEDED if any(entry is NEEDED for entry in made) else made


def _refusal(value: Any, field: Field) -> str:
    return f"is {value!r}; it must be {valid(field)}"


def valid(field: Field) -> str:
    """The values that a field may have, in words."""
    kinds = typing.get_args(field.kind)
    if field.choices:
        return f"{'a tuple of' if kinds else 'one of'} {', '.join(field.choices)}"
    if not kinds:
        return WORDS[field.kind]
    number = "" if Ellipsis in kinds else f"{len(kinds)} "
    return f"a tuple of {number}{WORDS[kinds[0]].rpartition(' ')[2]}s"


def kind_name(kind: Any) -> str:
    """int, or tuple[int, ...]."""
    return str(kind) if typing.get_args(kind) else kind.__name__


def parse(text: str, field: Field) -> Any:
    """The value that a command line gives a field. Raises ValueError as `read` does."""
    if field.kind is str:
        return read(text, field)
    try:
        value = float(text) if field.kind is float else ast.literal_eval(text.strip())
    except (ValueError, SyntaxError):
        raise ValueError(_refusal(text, field)) from None
    return read(value, field)


def may_change(name: str, config: Mapping[str, Any]) -> bool:
    """Whether a resume with this (complete) config may change the field, such as "train.steps"."""
    fields = flat(stage_fields(config["model"]["family"]))
    if name not in fields:
        return False
    resume = fields[name].resume
    return flat(config)[resume[0]] == resume[1] if isinstance(resume, tuple) else resume


def flat(config: Mapping[str, Any]) -> dict[str, Any]:
    """{"optim.lr": 1e-4, ...}; sequences as tuples, so that a config read from JSON is equal."""
    return dict(_leaves(config, ""))


def _leaves(config: Mapping[str, Any], prefix: str) -> Iterator[tuple[str, Any]]:
    for key, value in config.items():
        if isinstance(value, Mapping):
            yield from _leaves(value, f"{prefix}{key}.")
        else:
            yield prefix + key, _frozen(value)


def _frozen(value: Any) -> Any:
    return tuple(_frozen(v) for v in value) if isinstance(value, (list, tuple)) else value


def changes(before: Mapping[str, Any], after: Mapping[str, Any]) -> dict[str, tuple[Any, Any]]:
    """{field: (value before, value after)} of all that differs."""
    a, b = flat(before), flat(after)
    return {k: (a.get(k), b.get(k)) for k in sorted(a.keys() | b.keys()) if a.get(k) != b.get(k)}
