r"""The cascade: the checkpoint of each stage and its sampling settings.

    python -m imagen_jax.sample --config configs/cascade.py \
        --config.base.checkpoint=WORKDIR --config.sr_1.checkpoint=WORKDIR \
        --config.sr_2.checkpoint=WORKDIR --config.encoder=T5_DIRECTORY --prompt "..." --output DIR
    python -m imagen_jax.sample --config configs/cascade.py:demo --prompt "a red apple" \
        --output pictures

CPU: the second command uses the embedded cascade, without data or training. Expect a picture of a
red apple at 16, 64 and 256 pixels after about a minute, most of it compilation.

The paper's cascade is 64 -> 256 -> 1024. A checkpoint is a workdir, a checkpoint's directory or an
exported file. A stage without a checkpoint ends the cascade before it.

Hardware: one H100, or TPU v5e; by its planned memory one v5e chip is enough (batch_size 4).
`imagen_jax.plan --sample` plans 30,000 pictures in 19.3 h on v5e:2x2 and in 4.8 h on v5e:4x4
(batch_size 64), and in no less than 11.4 h on one H100. Extrapolated from 8 timed steps: base_64
samples 0.516 images/s with 256 steps of DDIM on an H100.
Expect: the paper's stages are not trained yet.
Recorded: BENCHMARKS.md, "Planned, not run: sampling the paper's cascade", and "One H100".

Variant `:demo`: the cascade that ships with the package, 16 -> 64 -> 256, on two CPU cores or one
GPU. At 256 pixels retrieval@5 of held-out captions is 84.4 % [75.8, 90.3], n = 96.
Recorded: BENCHMARKS.md, "The embedded cascade".
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
    # Planned peaks of the stages: 6.4, 6.2 and 10.1 of 15.75 GiB per chip of v5e:2x2 with 4 images
    # per chip, 6.0 of them parameters; 14.2, 8.3 and 31.1 of 74 GiB on one H100. More chips need a
    # larger batch: 64 on v5e:4x4 has the same peaks.
    c.batch_size = 16
    # Every chip holds all parameters. fsdp=4 saves 4.5 GiB per chip of v5e:2x2, but all-gathers the
    # parameters at every step: use it for batches that do not fit otherwise. The rules are those of
    # each stage's training config.
    c.mesh = ConfigDict(dict(data=-1, fsdp=1, model=1, spatial=1))
    # The sampling settings of the stages' configs; the command line changes them for the cascade.
    c.base = stage(base_64, arg, "embedded:base_16" if demo else "")
    c.sr_1 = stage(sr_256, arg, "embedded:sr_64" if demo else "")
    c.sr_2 = stage(sr_1024, arg, "embedded:sr_256" if demo else "")
    return c.lock()


def stage(config, arg: str, checkpoint: str) -> ConfigDict:
    """One stage: its checkpoint, its training config, its sampling settings."""
    return ConfigDict(
        dict(
            checkpoint=checkpoint,
            config=f"configs/{config.__name__.rpartition('.')[2]}.py" + f":{arg}" * bool(arg),
            sampling=config.get_config(arg).sampling.to_dict(),
        )
    )
