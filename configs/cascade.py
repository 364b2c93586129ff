r"""The cascade: which checkpoint each stage uses and how it is sampled.

    python -m imagen_jax.sample --config configs/cascade.py \
        --config.base.checkpoint=WORKDIR --config.sr_1.checkpoint=WORKDIR \
        --config.sr_2.checkpoint=WORKDIR --config.encoder=T5_DIRECTORY --prompt "..." --output DIR

Paper: 64 -> 256 -> 1024. `configs/cascade.py:demo` is the cascade that ships with the package, 16
-> 64 -> 256. A checkpoint is a workdir, a checkpoint's directory or an exported file; an empty one
ends the cascade before that stage.
"""

from ml_collections import ConfigDict

from configs import base_64, sr_256, sr_1024


def get_config(arg: str = "") -> ConfigDict:
    """`arg` is "" or "demo"."""
    if arg not in ("", "demo"):
        raise ValueError(f"cascade has no variant {arg!r}; use 'demo' or nothing")
    demo = arg == "demo"
    c = ConfigDict()
    c.encoder = "t5_tiny" if demo else "google/t5-v1_1-xxl"
    c.encoder_dtype = "bfloat16"
    c.which = "ema"  # or "params", "ema_1" ...
    c.batch_size = 16 if demo else 4
    # Each stage is sampled as its own config says; fields here change that for the cascade alone.
    c.base = stage(base_64, arg, "embedded:base_16" if demo else "")
    c.sr_1 = stage(sr_256, arg, "embedded:sr_64" if demo else "")
    c.sr_2 = stage(sr_1024, arg, "embedded:sr_256" if demo else "")
    return c.lock()


def stage(config, arg: str, checkpoint: str) -> ConfigDict:
    """One stage's checkpoint and sampling."""
    return ConfigDict(
        dict(checkpoint=checkpoint, sampling=config.get_config(arg).sampling.to_dict())
    )
