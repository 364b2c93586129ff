"""Declares every config field once. All code reads configs through `complete`.

A saved config (of a run, a checkpoint or a picture) may be older than a field. `Field.older` is the
value to assume where the field is absent, so older saved configs stay readable.
docs/config.md lists all fields; imagen_jax/field.py says which values a field accepts.
"""

import difflib
from collections.abc import Iterator, Mapping
from typing import Any

from imagen_jax.field import NEEDED, Field, read, within
from imagen_jax.field import parse as parse

Fields = Mapping[str, Any]  # {name: Field, or the Fields of a section}
SEEDS = "[0, 2^32)"  # JAX and the data order use 32-bit seeds; a larger seed would wrap

TEXT = {
    "dim": Field(
        "Width of the text features; 0: no text.", int, "section 2.1", interval="[0, inf)"
    ),
}

DATA = {
    "path": Field("Directory made by prepare_data.", str, resume=True),
    "image_size": Field("Side of the images in pixels.", int, "section 2.5", interval="[1, inf)"),
    "lowres_size": Field(
        "Low-res input size in pixels; 0 for a base model.", int, "section 2.5", interval="[0, inf)"
    ),
    "crop_size": Field(
        "Training crop size in pixels; 0 for whole images.", int, "section 2.5", interval="[0, inf)"
    ),
    "text_length": Field("Tokens per caption, including padding.", int, interval="[1, inf)"),
    "batch_size": Field(
        "Images per training step, over all devices.", int, "section 4.1", interval="[1, inf)"
    ),
    "caption": Field("Caption used: a random one or the first.", str, choices=("random", "first")),
    "flip": Field("Whether images are mirrored at random.", bool),
    "workers": Field(
        "Worker processes that read data; 0: trainer threads.",
        int,
        resume=True,
        interval="[0, inf)",
    ),
    "cache_mib": Field(
        "Decoded-image cache in MiB; no effect on batches.", int, resume=True, interval="[0, inf)"
    ),
}

MODEL = {
    "family": Field("Network architecture.", str, "F.1, B.1", choices=("unet", "efficient_unet")),
    "cond_dim": Field("Width of the projected text features; 0 for a model without text.", int),
    "pooling": Field(
        "Pooling of the text tokens into one vector.", str, "F.1", choices=("attention", "mean")
    ),
    "pool_heads": Field("Number of heads of attention pooling.", int),
    "scale_shift": Field("Whether the embedding scales and shifts features.", bool, "F.1"),
    "dropout": Field("Dropout rate in residual blocks.", float, "F.1", interval="[0, 1)"),
    "dtype": Field("Floating-point type of activations.", str, choices=("bfloat16", "float32")),
    "remat": Field(
        "Rematerialization: none, all but matrix products (matrix), or whole blocks (block).",
        str,
        choices=("none", "matrix", "block"),
        resume=True,
    ),
}

FAMILY_FIELDS = {
    "unet": {
        "channels": Field("Width of the first level.", int, "F.1"),
        "multipliers": Field("Level widths as multiples of `channels`.", tuple[int, ...], "F.1"),
        "blocks": Field("Residual blocks per level.", int, "F.1"),
        "attention": Field("Whether each level has self-attention.", tuple[bool, ...], "F.1"),
        "text_attention": Field(
            "Whether each level has cross-attention to the text.", tuple[bool, ...], "F.1"
        ),
        "head_channels": Field("Channels per attention head.", int, "F.1"),
        "res_block": Field(
            "Resampling: inside a residual block (biggan) or by a convolution (plain).",
            str,
            "F.1",
            choices=("biggan", "plain"),
        ),
        "patch": Field("Side of the input patches folded into channels; 1: none.", int),
    },
    "efficient_unet": {
        "widths": Field("Width of each level.", tuple[int, ...], "F.2, F.3"),
        "blocks": Field("Residual blocks of each level.", tuple[int, ...], "F.2, F.3"),
        "attention": Field(
            "Attention per level: none, to pixels (self), to text (cross), or to both (fused).",
            tuple[str, ...],
            "F.2, F.3",
            choices=("none", "self", "cross", "fused"),
        ),
        "heads": Field("Number of attention heads.", int, "F.2, F.3"),
        "residual_scale": Field("Factor of the sum of shortcut and residual branch.", float, "B.1"),
    },
}

DIFFUSION = {
    "schedule": Field(
        "Noise schedule log-SNR(t), used by density = uniform and grid = t.",
        str,
        "F.1-F.3",
        choices=("cosine", "linear", "flow"),
    ),
    "aug_schedule": Field(
        "Noise schedule log-SNR(t) of the augmentation of the low-res image.",
        str,
        choices=("cosine", "linear", "flow"),
    ),
    "aug_max": Field(
        "Largest low-res augmentation level in training.", float, "section 2.4", interval="[0, 1]"
    ),
    "prediction": Field(
        "Output of the network; u = eps - x.", str, "Appendix A", choices=("eps", "x", "v", "u")
    ),
    "text_drop": Field(
        "Probability of dropping the caption in training.", float, "section 4.1", interval="[0, 1]"
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
    ),
    "density_std": Field(
        "logit_normal only: standard deviation of logit(t).",
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
        "ancestral only: log variance between its lower (0) and upper bound (1).",
        float,
        "Appendix A",
        resume=True,
    ),
    "w": Field("Guidance weight; 1: no guidance.", float, "section 2.2", resume=True),
    "threshold": Field(
        "Thresholding of the predicted clean image x-hat.",
        str,
        "section 2.3",
        choices=("none", "static", "dynamic"),
        resume=True,
    ),
    "percentile": Field(
        "dynamic only: percentile of |x-hat|, 0 to 100.", float, "Fig. A.10", resume=True
    ),
    "aug_level": Field(
        "Low-res augmentation level in sampling, 0 to 1.", float, "section 2.4", resume=True
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
    ),
    "grid_rho": Field(
        "karras only: exponent.", float, "Karras et al. 2022", older=7.0, resume=True
    ),
    "w_interval": Field(
        "Guidance interval in log-SNR; outside it w = 1.",
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
        "Decay of the learning rate after warm-up: none (constant), or cosine to 0 at train.steps.",
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
        "Largest global norm of the gradient (clipping); 1e9 disables it.",
        float,
        interval="(0, inf)",
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

MESH = {
    "data": Field("Devices along `data`; -1: all remaining ones.", int, resume=True),
    "fsdp": Field("Devices along `fsdp`, which splits batch and training state.", int, resume=True),
    "model": Field("Devices along `model`, which splits features by `rules`.", int, resume=True),
    "spatial": Field("Devices along `spatial`, which splits image height.", int, resume=True),
    "fsdp_min_elements": Field("Smallest array split over `fsdp`, in elements.", int, resume=True),
    "rules": Field(
        "Rules (regular expression for a parameter path, placement); the first match applies.",
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
    "log_every": Field("Steps between two rows of metrics.", int, resume=True, interval="[1, inf)"),
    "sample_every": Field(
        "Steps between two sample grids; 0: no grids.", int, resume=True, interval="[0, inf)"
    ),
    "sample_rows": Field("Images per sample grid.", int, resume=True, interval="[1, inf)"),
    "save_every": Field("Steps between two checkpoints.", int, resume=True, interval="[1, inf)"),
    "keep": Field("Number of checkpoints to keep.", int, resume=True, interval="[1, inf)"),
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
    "sampling": SAMPLING,
}

CASCADE: Fields = {
    "encoder": Field("Text encoder: a directory or a name.", str, "section 2.1"),
    "encoder_dtype": Field(
        "Floating-point type of the text encoder.", str, choices=("bfloat16", "float32")
    ),
    "which": Field("Weights to load: ema, params, or ema_1, ema_2, ... (optim.ema_tracks).", str),
    "batch_size": Field("Images sampled per batch.", int),
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
    new: the config belongs to a new run, not to a saved one, so numbers must be in their intervals.

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
    """The completed section; appends its problems to `problems`."""
    if not isinstance(section, Mapping):
        name = prefix.removesuffix(".") or "the config"
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
    similar = difflib.get_close_matches(str(name), fields, 1, cutoff=0.5)
    valid_fields = f"valid fields are {', '.join(fields)}"
    hint = f"did you mean {prefix}{similar[0]}?" if similar else valid_fields
    return f"{prefix}{name} is unknown, {hint}"


def check_seed(seed: int, where: str) -> None:
    """Raises ValueError for a seed outside SEEDS.

    where: the name of the seed in the message, such as "--seed".
    """
    if not within(seed, SEEDS):
        raise ValueError(f"{where} {seed} is not a valid seed; give an integer in {SEEDS}")


def may_change(name: str, config: Mapping[str, Any]) -> bool:
    """Whether a resumed run may change a field.

    name: dotted path of the field, such as "train.steps".
    config: the complete config of the run.
    """
    fields = flat(stage_fields(config["model"]["family"]))
    if name not in fields:
        return False
    condition = fields[name].resume
    if isinstance(condition, tuple):
        other, value = condition
        return flat(config)[other] == value
    return condition


def flat(config: Mapping[str, Any]) -> dict[str, Any]:
    """{dotted path: value}, such as {"optim.lr": 1e-4}.

    Lists become tuples, so that a config read from JSON compares equal.
    """
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
    old, new = flat(before), flat(after)
    return {
        path: (old.get(path), new.get(path))
        for path in sorted(old.keys() | new.keys())
        if old.get(path) != new.get(path)
    }
