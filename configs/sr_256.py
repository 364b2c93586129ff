r"""The 64->256 super-resolution model: Efficient U-Net, 473M parameters with text (F.2).

    python -m imagen_jax.train --config configs/sr_256.py --config.data.path=PREPARED \
        --workdir WORKDIR
    python -m imagen_jax.train --config configs/sr_256.py:demo --config.data.path=data/emoji \
        --workdir runs/sr_64 --minutes 5

CPU: the second command trains `:demo`, 16->64, on two cores, on data/emoji of the README, for 5
minutes and saves. Expect about 1,000 steps; run the same command again to continue.

The paper's "600M" cannot be reproduced from its printed configuration (the trunk alone has 451M).

Hardware: 128 TPU v4 chips in the paper, 2.5M steps of 2048 images. This repository plans 106 h on
v4:4x4x8, 57 h on v5p:4x4x8 (128 chips each) and 73 h on v5e:16x16 (256 chips).
Expect: not trained yet, so no loss is known. Planned MFU: 54 % on v4, 55 % on v5e, 60 % on v5p.
Recorded: BENCHMARKS.md, "Planned, not run".

Variants:

    :demo     the demo's 16->64 on two CPU cores, batches of 8. The embedded sr_64 is this config
              after 10,936 steps at a rate of 1e-3, 2,729 at 2e-4 and 811 at 5e-5: squared error of
              x-hat from a clean low-res image 0.0105, of bicubic up-sampling 0.0265. 1.5 minutes
              give 301 steps.
              Recorded: BENCHMARKS.md, "The embedded cascade" and "`make demo` from a fresh clone".
    :tiny     for tests: 8 steps, seconds on a CPU.
"""

from ml_collections import ConfigDict

from configs import defaults


def get_config(arg: str = "") -> ConfigDict:
    """The complete config; `arg` is "", "demo" or "tiny"."""
    c = ConfigDict()
    c.name = "sr_256"
    c.seed = 0
    c.text = defaults.text(4096)  # T5-XXL v1.1; must be the width of the prepared embeddings
    # Trained on whole images (section 2.5).
    c.data = defaults.data() | dict(image_size=256, lowres_size=64, crop_size=0)
    c.model = dict(
        family="efficient_unet",
        widths=(128, 256, 512, 1024),
        blocks=(2, 4, 8, 8),
        attention=("none", "none", "none", "fused"),
        heads=8,
        cond_dim=512,
        pooling="attention",
        pool_heads=8,
        residual_scale=2**-0.5,  # section 2.5, B.1: read as the scale of residual sums
        scale_shift=True,
        dropout=0.0,
        dtype="bfloat16",
        remat="matrix",
    )
    c.diffusion = defaults.diffusion() | dict(aug_max=1.0)
    # Not in the paper: steps. w=8 has the best FID on COCO (Table 1). Levels of 0.1 to 0.3 look
    # best, level 0 has the best FID (Fig. A.11, A.12).
    c.sampling = defaults.sampling() | dict(steps=128, aug_level=0.1)
    c.optim = defaults.optim() | dict(optimizer="adam")
    c.mesh = defaults.mesh()
    # 256 rows take the time of about 5 training steps.
    c.train = defaults.train() | dict(validate_every=5_000)
    if arg in ("demo", "tiny"):
        defaults.small(c)
        (demo if arg == "demo" else tiny)(c)
    elif arg:
        raise ValueError(f"sr_256 has no variant {arg!r}; use 'demo' or 'tiny'")
    return c.lock()


def demo(c: ConfigDict) -> None:
    """16->64 on whole images, a quarter of the paper's resolution."""
    c.name = "sr_64"
    c.data.update(image_size=64, lowres_size=16, batch_size=8, cache_mib=64)
    c.model.update(
        widths=(32, 64, 128),
        blocks=(1, 2, 3),
        attention=("none", "none", "fused"),
        heads=4,
        cond_dim=128,
        pool_heads=4,
    )
    # With eps or v a small network must carry the noise of every pixel through half-size features.
    c.diffusion.prediction = "x"
    # Static thresholding keeps white backgrounds white, see base_64.
    c.sampling.update(steps=16, w=1.0, threshold="static")
    c.train.update(
        steps=100_000, log_every=20, sample_every=5_000, sample_rows=8, save_every=1_000, keep=2
    )


def tiny(c: ConfigDict) -> None:
    """A very small model with all components."""
    defaults.tiny(c)
    c.name = "sr_tiny"
    c.data.update(image_size=16, lowres_size=8)
    c.model.update(
        widths=(16, 32),
        blocks=(1, 1),
        attention=("none", "fused"),
        heads=2,
        cond_dim=16,
        pool_heads=2,
    )
