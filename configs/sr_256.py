"""The 64->256 super-resolution model (F.2): Efficient U-Net, 128 TPU v4 chips in the paper, 2.5M steps of 2048 images.

    python -m imagen_jax.train --config configs/sr_256.py --config.data.path=PREPARED --workdir WORKDIR

The paper's "600M" cannot be reproduced from its printed configuration; this is 473M (the trunk alone 451M).
Arguments: `:demo` for the demo's 16->64 (two CPU cores), `:tiny` for tests.
"""

from ml_collections import ConfigDict


def get_config(arg: str = "") -> ConfigDict:
    """The run's complete record; `arg` is "", "demo" or "tiny"."""
    c = ConfigDict()
    c.name = "sr_256"
    c.seed = 0
    c.text = dict(dim=4096)  # T5-XXL v1.1; must be the width of the prepared embeddings
    c.data = dict(
        path="",
        image_size=256,
        lowres_size=64,
        crop_size=0,  # whole images (section 2.5)
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
    c.diffusion = dict(schedule="cosine", aug_schedule="cosine", aug_max=1.0, prediction="eps", text_drop=0.1)
    c.sampling = dict(
        method="ancestral",
        steps=128,  # steps and gamma are not in the paper
        gamma=0.2,
        w=5.0,  # Fig. A.10; 8 for the FID on COCO (Table 1)
        threshold="dynamic",
        percentile=99.5,
        aug_level=0.1,  # [0.1, 0.3] looks best, 0 has the best FID (Fig. A.11, A.12)
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
        raise ValueError(f"sr_256 has no variant {arg!r}; use 'demo' or 'tiny'")
    return c.lock()


def small(c: ConfigDict) -> None:
    """What the demo and the tests share: the embedded encoder's text, one device, a fast rate, fp32."""
    c.text.dim = 256
    c.data.update(text_length=32, workers=0)
    c.mesh.fsdp = 1
    c.model.update(dtype="float32", remat="none")
    c.optim.update(lr=1e-3, warmup=100, ema=0.9998)


def demo(c: ConfigDict) -> None:
    """16->64 on whole images, a quarter of the paper's resolution."""
    c.name = "sr_64"
    c.data.update(image_size=64, lowres_size=16, batch_size=8, cache_mib=64)
    c.model.update(widths=(32, 64, 128), blocks=(1, 2, 3), attention=("none", "none", "fused"), heads=4, cond_dim=128, pool_heads=4)
    c.diffusion.prediction = "x"  # eps and v make a small network carry the noise of every pixel through its half-size features
    c.sampling.update(steps=16, w=1.0, threshold="static")  # white stays white, see base_64
    c.train.update(steps=100_000, log_every=20, sample_every=5_000, sample_rows=8, save_every=1_000, keep=2)


def tiny(c: ConfigDict) -> None:
    """A few thousand parameters with every part in place."""
    c.name = "sr_tiny"
    c.data.update(image_size=16, lowres_size=8, batch_size=8)
    c.model.update(widths=(16, 32), blocks=(1, 1), attention=("none", "fused"), heads=2, cond_dim=16, pool_heads=2)
    c.sampling.update(steps=4)
    c.train.update(steps=8, log_every=1, sample_every=0, save_every=4)
