"""The 256->1024 super-resolution model (F.3): Efficient U-Net without self-attention, trained on 64->256 crops of the 1024 image.

    python -m imagen_jax.train --config configs/sr_1024.py --config.data.path=PREPARED --workdir WORKDIR

128 TPU v4 chips in the paper, 2.5M steps of 2048 crops. The paper's "400M" cannot be reproduced from its printed configuration;
this is 469M. Arguments: `:demo` for the demo's 64->256 on 64x64 crops (two CPU cores), `:tiny` for tests.
"""

from ml_collections import ConfigDict


def get_config(arg: str = "") -> ConfigDict:
    """The run's complete record; `arg` is "", "demo" or "tiny"."""
    c = ConfigDict()
    c.name = "sr_1024"
    c.seed = 0
    c.text = dict(dim=4096)  # T5-XXL v1.1; must be the width of the prepared embeddings
    c.data = dict(
        path="",
        image_size=1024,
        lowres_size=256,
        crop_size=256,  # with the low-res crop of 64 at the same place (section 2.5)
        text_length=128,
        batch_size=2048,
        caption="random",
        flip=False,
        workers=8,
        cache_mib=0,
    )
    c.model = dict(
        family="efficient_unet",
        widths=(128, 256, 512, 1024),
        blocks=(2, 4, 8, 8),
        attention=("none", "none", "none", "cross"),  # text only: it runs on images larger than it trains on (D.3.1)
        heads=8,
        cond_dim=512,
        pooling="attention",
        pool_heads=8,
        residual_scale=2**-0.5,  # section 2.5, B.1: read as the scale of residual sums
        scale_shift=True,
        dropout=0.0,
        dtype="bfloat16",
        remat=True,
    )
    c.diffusion = dict(schedule="linear", aug_schedule="cosine", aug_max=1.0, prediction="eps", text_drop=0.1)
    c.sampling = dict(
        method="ddim",
        steps=32,  # used by Azizi et al. 2023 for this very stage
        gamma=0.0,
        w=5.0,  # Fig. A.10
        threshold="dynamic",
        percentile=99.5,
        aug_level=0.1,
    )
    c.optim = dict(
        optimizer="adam",
        lr=1e-4,
        warmup=10_000,
        decay="constant",
        beta1=0.9,
        beta2=0.999,
        eps=1e-8,
        weight_decay=0.0,
        clip=1.0,  # not in the paper; its authors' other code
        ema=0.9999,  # likewise
        accumulation=1,
    )
    c.mesh = dict(data=-1, fsdp=16, model=1, spatial=1, fsdp_min_elements=65_536, rules=((".*", "fsdp"),))
    c.train = dict(steps=2_500_000, log_every=100, sample_every=5_000, sample_rows=16, save_every=5_000, keep=3)
    if arg in ("demo", "tiny"):
        small(c)
        (demo if arg == "demo" else tiny)(c)
    elif arg:
        raise ValueError(f"sr_1024 has no variant {arg!r}; use 'demo' or 'tiny'")
    return c.lock()


def small(c: ConfigDict) -> None:
    """What the demo and the tests share: the embedded encoder's text, one device, a fast rate, fp32."""
    c.text.dim = 256
    c.data.update(text_length=32, workers=0)
    c.mesh.fsdp = 1
    c.model.update(dtype="float32", remat=False)
    c.optim.update(lr=1e-3, warmup=500, ema=0.9998)


def demo(c: ConfigDict) -> None:
    """64->256, trained on 64x64 crops whose low-res crops are 16x16."""
    c.name = "sr_256_crops"
    c.data.update(image_size=256, lowres_size=64, crop_size=64, batch_size=32, cache_mib=768)
    c.model.update(widths=(32, 64, 96), blocks=(1, 1, 2), attention=("none", "none", "cross"), heads=3, cond_dim=64, pool_heads=2)
    c.diffusion.prediction = "v"
    c.sampling.update(steps=12, w=1.0)
    c.train.update(steps=20_000, log_every=50, sample_every=2_000, sample_rows=4, save_every=500, keep=2)


def tiny(c: ConfigDict) -> None:
    """A few thousand parameters with every part in place."""
    c.name = "sr_crops_tiny"
    c.data.update(image_size=32, lowres_size=16, crop_size=16, batch_size=8)
    c.model.update(widths=(16, 32), blocks=(1, 1), attention=("none", "cross"), heads=2, cond_dim=16, pool_heads=2)
    c.sampling.update(steps=4)
    c.train.update(steps=8, log_every=1, sample_every=0, save_every=4)
