"""The fields of a config, each declared once. Code that reads a config reads it through `complete`.

A record (a run's config.json, the config of a checkpoint or of a picture) may be older than a
field. Such a field declares the value that its absence means, so that older records stay readable.
docs/config.md lists all fields; imagen_jax/field.py says which values a field accepts.
"""

import difflib
from collections.abc import Iterator, Mapping
from typing import Any

from imagen_jax.field import NEEDED, Field, read, within
from imagen_jax.field import parse as parse

Fields = Mapping[str, Any]  # {name: Field, or the Fields of a section}
SEEDS = "[0, 2^32)"  # jax and the data order take 32 bits; larger seeds would wrap

TEXT = {
    "dim": Field(
        "Width of the text features; 0: a model without text.",
        int,
        "section 2.1",
        interval="[0, inf)",
    ),
}

DATA = {
    "path": Field("Directory made by prepare_data.", str, resume=True),
    "image_size": Field("Side of the images in pixels.", int, "section 2.5", interval="[1, inf)"),
    "lowres_size": Field(
        "Side of the low-res input in pixels; 0: a base model.",
        int,
        "section 2.5",
        interval="[0, inf)",
    ),
    "crop_size": Field(
        "Side of the training crops in pixels; 0: whole images.",
        int,
        "section 2.5",
        interval="[0, inf)",
    ),
    "text_length": Field("Tokens of a caption, padding included.", int, interval="[1, inf)"),
    "batch_size": Field(
        "Images in a training step, over all devices.", int, "section 4.1", interval="[1, inf)"
    ),
    "caption": Field("Caption of an image that is used.", str, choices=("random", "first")),
    "flip": Field("Whether images are mirrored at random.", bool),
    "workers": Field(
        "Processes that read data; 0: threads of the trainer.",
        int,
        resume=True,
        interval="[0, inf)",
    ),
    "cache_mib": Field(
        "MiB of memory for decoded images; changes no batch.", int, resume=True, interval="[0, inf)"
    ),
}

MODEL = {
    "family": Field("Kind of network.", str, "F.1, B.1", choices=("unet", "efficient_unet")),
    "cond_dim": Field("Width of the conditioning embedding; 0: a model without text.", int),
    "pooling": Field(
        "How the tokens become one vector.", str, "F.1", choices=("attention", "mean")
    ),
    "pool_heads": Field("Heads of attention pooling.", int),
    "scale_shift": Field("Whether the embedding scales and shifts the norms.", bool, "F.1"),
    "dropout": Field("Dropout rate in residual blocks.", float, "F.1", interval="[0, 1)"),
    "dtype": Field("Type of the arithmetic.", str, choices=("bfloat16", "float32")),
    "remat": Field(
        "Arrays that the backward pass recomputes.",
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
            "How resolution changes: inside a residual block (biggan), or in a convolution.",
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
        "Log-SNR as a function of time, for the noise of the low-res image.",
        str,
        choices=("cosine", "linear", "flow"),
    ),
    "aug_max": Field(
        "Highest noise level of the low-res image in training.",
        float,
        "section 2.4",
        interval="[0, 1]",
    ),
    "prediction": Field(
        "Output of the network; u = eps - x.", str, "Appendix A", choices=("eps", "x", "v", "u")
    ),
    "text_drop": Field(
        "Share of captions dropped in training.", float, "section 4.1", interval="[0, 1]"
    ),
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
        interval="(0, inf)",
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
    "lr": Field("Learning rate after warm-up.", float, "section 4.1", interval="[0, inf)"),
    "warmup": Field("Steps of linear warm-up.", int, "section 4.1", interval="[0, 2^31)"),
    "decay": Field(
        "Learning rate after warm-up: constant, or a cosine to 0 at train.steps.",
        str,
        "F.1-F.3",
        choices=("constant", "cosine"),
    ),
    "beta1": Field("Adam's decay of the first moment.", float, "F.2, F.3", interval="[0, 1)"),
    "beta2": Field("Adam's decay of the second moment.", float, "F.2, F.3", interval="[0, 1)"),
    "eps": Field("Adam's epsilon.", float, "F.2, F.3", interval="[0, inf)"),
    "weight_decay": Field(
        "Weight decay of the kernels; norms, biases and embeddings are not decayed.",
        float,
        "F.1-F.3",
        interval="[0, inf)",
    ),
    "clip": Field(
        "Largest global norm of the gradient; a large number, such as 1e9: no clipping.",
        float,
        interval="(0, inf)",
    ),
    "ema": Field("Decay of the EMA of the parameters.", float, interval="[0, 1)"),
    "accumulation": Field(
        "Parts in which a batch is computed; with dropout, each part has its own masks.",
        int,
        resume=("model.dropout", 0.0),
        interval="[1, inf)",
    ),
    "ema_tracks": Field(
        "Decays of further EMAs, in addition to optim.ema.",
        tuple[float, ...],
        older=(),
        interval="[0, 1)",
    ),
}

MESH = {
    "data": Field("Devices along `data`; -1: all remaining ones.", int, resume=True),
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
    "steps": Field(
        "Training steps.",
        int,
        "section 4.1",
        resume=("optim.decay", "constant"),
        interval="[1, 2^31)",
    ),
    "log_every": Field(
        "Steps from one row of metrics to the next.", int, resume=True, interval="[1, inf)"
    ),
    "sample_every": Field(
        "Steps from one sample grid to the next; 0: none.", int, resume=True, interval="[0, inf)"
    ),
    "sample_rows": Field("Images in a sample grid.", int, resume=True, interval="[1, inf)"),
    "save_every": Field(
        "Steps from one checkpoint to the next.", int, resume=True, interval="[1, inf)"
    ),
    "keep": Field("Checkpoints kept.", int, resume=True, interval="[1, inf)"),
}

STAGE: Fields = {
    "name": Field("Name of the stage.", str, resume=True),
    "seed": Field("Seed of parameters, data order and noise.", int, interval=SEEDS),
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
    "encoder_dtype": Field("Type of its arithmetic.", str, choices=("bfloat16", "float32")),
    "which": Field("Weights of a checkpoint: ema, params, or ema_1 ... of ema_tracks.", str),
    "batch_size": Field("Images drawn at once.", int),
    "base": CASCADE_STAGE,
    "sr_1": CASCADE_STAGE,
    "sr_2": CASCADE_STAGE,
}
# {field of `sampling`: the flag of `evaluate` that replaces it}
EVALUATE_FLAGS = {name: name for name in SAMPLING} | {"method": "sampler"}


def stage_fields(family: str) -> Fields:
    """The fields of a stage whose network is of this family."""
    return {**STAGE, "model": {**MODEL, **FAMILY_FIELDS[family]}}


def complete(config: Mapping[str, Any], where: str = "config", new: bool = False) -> dict[str, Any]:
    """A stage's config as a plain dict, with the values that an older record means by absence.

    Values come as JSON returns them: tuples as lists, and ints of float fields as floats.

    where: names the config in messages.
    new: the config is of a run about to start, not a record, so numbers must be in their intervals.

    Raises ValueError for unknown and missing fields, wrong types and invalid values, each with the
    value and the valid ones.
    """
    try:
        family = config["model"]["family"]
    except (KeyError, TypeError):
        choices = ", ".join(FAMILY_FIELDS)
        raise ValueError(f"{where}: model.family is missing; it must be one of {choices}") from None
    if family not in tuple(FAMILY_FIELDS):
        choices = ", ".join(FAMILY_FIELDS)
        raise ValueError(f"{where}: model.family is {family!r}; it must be one of {choices}")
    return _completed(config, stage_fields(family), where, new)


def complete_cascade(config: Mapping[str, Any], where: str = "cascade config") -> dict[str, Any]:
    """`complete` for the config of a cascade."""
    return _completed(config, CASCADE, where)


def complete_sampling(sampling: Mapping[str, Any], where: str = "config") -> dict[str, Any]:
    """`complete` for the section `sampling` alone."""
    return _completed({"sampling": sampling}, {"sampling": SAMPLING}, where)["sampling"]


def _completed(config: Any, fields: Fields, where: str, new: bool = False) -> dict[str, Any]:
    problems: list[str] = []
    completed = _section(config, fields, "", new, problems)
    if problems:
        raise ValueError(f"{where}: {'; '.join(problems)}")
    return completed


def _section(
    section: Any, fields: Fields, prefix: str, new: bool, problems: list[str]
) -> dict[str, Any]:
    """A section, completed; its problems are added to the list."""
    if not isinstance(section, Mapping):
        name = prefix.removesuffix(".") or "it"
        problems.append(f"{name} is {section!r}; it must have the fields {', '.join(fields)}")
        return {}
    problems += [_unknown(name, fields, prefix) for name in section if name not in fields]
    completed = {}
    for name, field in fields.items():
        path = prefix + name
        if name in section and isinstance(field, Mapping):
            completed[name] = _section(section[name], field, f"{path}.", new, problems)
        elif name in section:
            try:
                completed[name] = read(section[name], field, new)
            except ValueError as error:
                problems.append(f"{path} {error}")
        elif isinstance(field, Mapping) or field.older is NEEDED:
            problems.append(f"{path} is missing")
        else:
            completed[name] = read(field.older, field)
    return completed


def _unknown(name: str, fields: Fields, prefix: str) -> str:
    near = difflib.get_close_matches(str(name), fields, 1, cutoff=0.5)
    hint = f"did you mean {prefix}{near[0]}?" if near else f"valid are {', '.join(fields)}"
    return f"{prefix}{name} is unknown, {hint}"


def check_seed(seed: int, where: str) -> None:
    """Raises ValueError for a seed outside SEEDS, which would wrap. `where` names it."""
    if not within(seed, SEEDS):
        raise ValueError(f"{where} {seed} is not a seed; it must be an integer in {SEEDS}")


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
    """{field: (value before, value after)} of all fields that differ."""
    a, b = flat(before), flat(after)
    return {k: (a.get(k), b.get(k)) for k in sorted(a.keys() | b.keys()) if a.get(k) != b.get(k)}
