"""The fields of the config sections `train` and `mesh`, for imagen_jax/schema.py."""

from imagen_jax.field import Field, Need

GRIDS = Need("train.sample_every", unless=(0,))
# Numbers of a validation by which checkpoints can be kept; lower ones are better.
MEASURES = ("ema/x_error", "ema/loss", "params/x_error", "params/loss")
VALIDATION = Need("train.validate_every", unless=(0,))
SPIKES = Need("train.spike_factor", unless=(0.0,))
SKIPS = (Need("train.on_bad_step", ("skip",)), Need("train.on_spike", ("skip",)))

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

# Of a cascade; the rules are those of each stage's training.
CASCADE_MESH = {
    "data": Field("Devices along `data`; -1: all remaining ones.", int, older=-1),
    "fsdp": Field("Devices along `fsdp`, which splits batch and parameters.", int, older=1),
    "model": Field("Devices along `model`, which splits features by the rules.", int, older=1),
    "spatial": Field("Devices along `spatial`, which splits image height.", int, older=1),
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
    "sample_rows": Field(
        "Images per sample grid.", int, resume=True, interval="[1, inf)", needs=(GRIDS,)
    ),
    "validate_every": Field(
        "Steps between two validations; 0: none.", int, older=0, resume=True, interval="[0, inf)"
    ),
    "validate_rows": Field(
        "Images per validation.",
        int,
        older=256,
        resume=True,
        interval="[2, inf)",
        needs=(VALIDATION,),
    ),
    "wandb": Field(
        "Weights & Biases: PROJECT or ENTITY/PROJECT for a copy of the log; empty: none.",
        str,
        older="",
        resume=True,
    ),
    "save_every": Field("Steps between two checkpoints.", int, resume=True, interval="[1, inf)"),
    "keep": Field("Number of newest checkpoints to keep.", int, resume=True, interval="[1, inf)"),
    "fast_every": Field(
        "Steps between two fast checkpoints on each host; 0: none.",
        int,
        older=0,
        resume=True,
        interval="[0, inf)",
    ),
    "fast_dir": Field(
        "Directory of the fast checkpoints on each host, on a local disk or in memory.",
        str,
        older="/dev/shm/imagen_jax",
        resume=True,
        needs=(Need("train.fast_every", unless=(0,)),),
    ),
    "keep_every": Field(
        "Checkpoints whose step is a multiple of it stay for ever; 0: none.",
        int,
        older=0,
        resume=True,
        interval="[0, inf)",
    ),
    "keep_best": Field(
        "Number of checkpoints to keep with the lowest `best_by`.",
        int,
        older=0,
        resume=True,
        interval="[0, inf)",
        needs=(VALIDATION,),
    ),
    "best_by": Field(
        "Validation measure that orders checkpoints.",
        str,
        older=MEASURES[0],
        resume=True,
        choices=MEASURES,
        needs=(Need("train.keep_best", unless=(0,)),),
    ),
    "on_bad_step": Field(
        "A step that is not finite ends the run (stop), or is skipped (skip).",
        str,
        choices=("stop", "skip"),
        older="stop",
        resume=True,
    ),
    "max_skips": Field(
        "Most skipped steps of 1,000 consecutive ones; the next one ends the run.",
        int,
        older=10,
        resume=True,
        interval="[1, inf)",
        needs=(SKIPS,),
    ),
    # A resume that changes it from or to 0 starts or drops the window of gradient norms.
    "spike_factor": Field(
        "A gradient norm above this multiple of the median of the last 128 is a spike; 0: none is.",
        float,
        older=0.0,
        resume=True,
        interval="[0, inf)",
    ),
    "on_spike": Field(
        "A spike is only logged (log), or skipped like a bad step (skip).",
        str,
        choices=("log", "skip"),
        older="log",
        resume=True,
        needs=(SPIKES,),
    ),
}
