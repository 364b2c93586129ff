r"""The 256->1024 super-resolution model (F.3): Efficient U-Net without self-attention, trained on
64->256 crops of the 1024 image.

    python -m imagen_jax.train --config configs/sr_1024.py --config.data.path=PREPARED \
        --workdir WORKDIR

128 TPU v4 chips in the paper, 2.5M steps of 2048 crops. The paper's "400M" cannot be reproduced
from its printed configuration; this is 469M. Arguments: `:demo` for the demo's 64->256 on 64x64
crops (two CPU cores), `:tiny` for tests.
"""

from ml_collections import ConfigDict

from configs import defaults, sr_256


def get_config(arg: str = "") -> ConfigDict:
    """The run's complete record: sr_256's but for what stands here; `arg` is "", "demo"
    or "tiny".
    """
    c = sr_256.get_config().unlock()
    c.name = "sr_1024"
    c.data.update(
        image_size=1024, lowres_size=256, crop_size=256
    )  # with the low-res crop of 64 at the same place (section 2.5)
    c.model.attention = (
        "none",
        "none",
        "none",
        "cross",
    )  # text only: it runs on images larger than it trains on (D.3.1)
    c.diffusion.schedule = "linear"
    c.sampling.update(
        method="ddim", steps=32, gamma=0.0, w=5.0
    )  # steps of Azizi et al. 2023 for this very stage; w of Fig. A.10
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
    # eps and v make a small network carry the noise of every pixel through its half-size features
    c.diffusion.prediction = "x"
    c.sampling.update(
        method="ancestral", gamma=0.2, steps=12, w=1.0, threshold="static"
    )  # white stays white, see base_64
    c.train.update(
        steps=100_000, log_every=20, sample_every=5_000, sample_rows=4, save_every=1_000, keep=2
    )


def tiny(c: ConfigDict) -> None:
    """A few thousand parameters with every part in place."""
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
