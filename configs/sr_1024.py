r"""The 256->1024 super-resolution model: Efficient U-Net, 469M parameters with text (F.3).

    python -m imagen_jax.train --config configs/sr_1024.py --config.data.path=PREPARED \
        --workdir WORKDIR
    python -m imagen_jax.train --config configs/sr_1024.py:demo --config.data.path=data/emoji \
        --workdir runs/sr_256 --minutes 5

CPU: the second command trains `:demo`, 64->256, on two cores, on data/emoji of the README, for 5
minutes and saves. Expect about 1,200 steps; run the same command again to continue.

It has no self-attention and trains on 64->256 crops of the 1024 image. The paper's "400M" cannot be
reproduced from its printed configuration.

Hardware: 128 TPU v4 chips in the paper, 2.5M steps of 2048 crops. This repository plans 105 h on
v4:4x4x8, 57 h on v5p:4x4x8 (128 chips each) and 73 h on v5e:16x16 (256 chips).
Expect: not trained yet, so no loss is known. Planned MFU: 54 % on v4, 55 % on v5e, 60 % on v5p.
Recorded: BENCHMARKS.md, "Planned, not run".

Variants:

    :demo     the demo's 64->256 on 64x64 crops on two CPU cores, batches of 8. The embedded sr_256
              is this config after 14,856 steps at a rate of 1e-3, 5,478 at 2e-4 and 1,746 at 5e-5:
              squared error of x-hat from a clean low-res image 0.0040, of bicubic up-sampling
              0.0056. 1.2 minutes give 289 steps.
              Recorded: BENCHMARKS.md, "The embedded cascade" and "`make demo` from a fresh clone".
    :tiny     for tests: 8 steps, seconds on a CPU.
"""

from ml_collections import ConfigDict

from configs import defaults, sr_256


def get_config(arg: str = "") -> ConfigDict:
    """The complete config: that of sr_256 with the changes below; `arg` is "", "demo" or "tiny"."""
    c = sr_256.get_config().unlock()
    c.name = "sr_1024"
    # The low-res crop of 64 is at the same position (section 2.5).
    c.data.update(image_size=1024, lowres_size=256, crop_size=256)
    # Text attention only: the network samples larger images than it trains on (D.3.1).
    c.model.attention = ("none", "none", "none", "cross")
    c.diffusion.schedule = "linear"
    # Steps: Azizi et al. 2023, for this stage. w: Fig. A.10.
    c.sampling.update(method="ddim", steps=32, gamma=0.0, w=5.0)
    if arg in ("demo", "tiny"):
        defaults.small(c)
        (demo if arg == "demo" else tiny)(c)
    elif arg:
        raise ValueError(f"sr_1024 has no variant {arg!r}; use 'demo' or 'tiny'")
    return c.lock()


def demo(c: ConfigDict) -> None:
    """64->256, trained on 64x64 crops whose low-res crops are 16x16."""
    c.name = "sr_256_crops"
    c.data.update(image_size=256, lowres_size=64, crop_size=64, batch_size=8, cache_mib=768)
    c.model.update(
        widths=(32, 64, 96),
        blocks=(1, 1, 2),
        attention=("none", "none", "cross"),
        heads=3,
        cond_dim=64,
        pool_heads=2,
    )
    # With eps or v a small network must carry the noise of every pixel through half-size features.
    c.diffusion.prediction = "x"
    # Static thresholding keeps white backgrounds white, see base_64.
    c.sampling.update(method="ancestral", gamma=0.2, steps=12, w=1.0, threshold="static")
    c.train.update(
        steps=100_000, log_every=20, sample_every=5_000, sample_rows=4, save_every=1_000, keep=2
    )


def tiny(c: ConfigDict) -> None:
    """A very small model with all components."""
    defaults.tiny(c)
    c.name = "sr_crops_tiny"
    c.data.update(image_size=32, lowres_size=16, crop_size=16)
    c.model.update(
        widths=(16, 32),
        blocks=(1, 1),
        attention=("none", "cross"),
        heads=2,
        cond_dim=16,
        pool_heads=2,
    )
