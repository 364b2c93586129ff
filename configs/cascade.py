"""The cascade: which checkpoint each stage uses and how it is sampled.

    python -m imagen_jax.sample --config configs/cascade.py --config.base.checkpoint=WORKDIR --config.sr_1.checkpoint=WORKDIR \
        --config.sr_2.checkpoint=WORKDIR --config.encoder=T5_DIRECTORY --prompt "..." --output DIR

Paper: 64 -> 256 -> 1024. `configs/cascade.py:demo` is the cascade that ships with the package, 16 -> 64 -> 256. A checkpoint is a
workdir, a checkpoint's directory or an exported file; an empty one ends the cascade before that stage.
"""

from ml_collections import ConfigDict


def get_config(arg: str = "") -> ConfigDict:
    """`arg` is "" or "demo"."""
    c = ConfigDict()
    c.encoder = "google/t5-v1_1-xxl"
    c.encoder_dtype = "bfloat16"
    c.which = "ema"  # or "params"
    c.batch_size = 4
    # Steps and gamma are not in the paper; weights as in Fig. A.10; augmentation level in [0.1, 0.3] (Figs. A.11, A.12).
    c.base = stage(method="ancestral", steps=256, gamma=0.2, w=5.0, aug_level=0.0)
    c.sr_1 = stage(method="ancestral", steps=128, gamma=0.2, w=5.0, aug_level=0.1)
    c.sr_2 = stage(method="ddim", steps=32, gamma=0.0, w=5.0, aug_level=0.1)
    if arg == "demo":
        c.encoder = "t5_tiny"
        c.batch_size = 16
        c.base = stage(checkpoint="embedded:base_16", method="ddim", steps=32, gamma=0.0, w=3.0, aug_level=0.0)
        c.sr_1 = stage(checkpoint="embedded:sr_64", method="ddim", steps=16, gamma=0.0, w=1.5, aug_level=0.1)
        c.sr_2 = stage(checkpoint="embedded:sr_256", method="ddim", steps=12, gamma=0.0, w=1.0, aug_level=0.1)
    elif arg:
        raise ValueError(f"cascade has no variant {arg!r}; use 'demo' or nothing")
    return c.lock()


def stage(checkpoint: str = "", **sampling) -> ConfigDict:
    """One stage's checkpoint and sampling; dynamic thresholding at p = 99.5 everywhere (section 2.3, Fig. A.10)."""
    return ConfigDict(dict(checkpoint=checkpoint, sampling=dict(threshold="dynamic", percentile=99.5) | sampling))
