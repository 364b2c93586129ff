"""The 64x64 base model (F.1): 2.26B parameters with text, 256 TPU v4 chips in the paper, 2.5M steps of 2048 images.

    python -m imagen_jax.train --config configs/base_64.py --config.data.path=PREPARED --workdir WORKDIR

Arguments: `configs/base_64.py:width=256` for the ablation sizes (192: 300M, 256: 500M, 384: 1B; same recipe, cond_dim 512 up to 500M),
`:demo` for the demo's base at 16x16 (two CPU cores, minutes), `:tiny` for tests (seconds).
"""

from ml_collections import ConfigDict


def get_config(arg: str = "") -> ConfigDict:
    """The run's complete record; `arg` is "", "width=N", "demo" or "tiny"."""
    c = ConfigDict()
    c.name = "base_64"
    c.seed = 0
    c.text = dict(dim=4096)  # T5-XXL v1.1; must be the width of the prepared embeddings
    c.data = dict(
        path="",  # a directory made by imagen_jax.prepare_data
        image_size=64,
        lowres_size=0,
        crop_size=0,
        text_length=128,  # not in the paper; NeMo's choice
        batch_size=2048,
        caption="random",
        flip=False,
        workers=8,
        cache_mib=0,
    )
    c.model = dict(
        family="unet",
        channels=512,
        multipliers=(1, 2, 3, 4),
        blocks=3,
        attention=(False, True, True, True),  # at 32, 16 and 8
        text_attention=(False, True, True, True),
        head_channels=64,
        cond_dim=2048,  # not in the paper; the published sizes allow 512 to 4096
        pooling="attention",
        pool_heads=32,
        res_block="biggan",
        scale_shift=True,
        patch=1,
        dropout=0.0,
        dtype="bfloat16",
        remat="matrix",
    )
    c.diffusion = dict(schedule="cosine", aug_schedule="cosine", aug_max=0.0, prediction="eps", text_drop=0.1)
    c.sampling = dict(
        method="ancestral",
        steps=256,
        gamma=0.2,  # steps and gamma are not in the paper
        w=5.0,  # Fig. A.10; 1.35 for the best FID on COCO (Table 1)
        threshold="dynamic",
        percentile=99.5,
        aug_level=0.0,
    )
    c.optim = dict(
        optimizer="adafactor",
        lr=1e-4,
        warmup=10_000,
        decay="constant",  # the listing's cosine has an impossible end value
        beta1=0.9,  # Adam's, unused by Adafactor
        beta2=0.999,
        eps=1e-8,
        weight_decay=0.0,
        clip=1.0,  # not in the paper; its authors' other code
        ema=0.9999,  # likewise
        accumulation=1,
    )
    c.mesh = dict(data=-1, fsdp=16, model=1, spatial=1, fsdp_min_elements=65_536, rules=((".*", "fsdp"),))
    c.train = dict(steps=2_500_000, log_every=100, sample_every=5_000, sample_rows=16, save_every=5_000, keep=3)
    name, _, value = arg.partition("=")
    if name == "width":
        width = int(value)
        cond_dim = 512 if width <= 256 else 2048
        c.name = f"base_64_w{width}"
        c.model.update(channels=width, cond_dim=cond_dim, pool_heads=cond_dim // 64)
    elif name in ("demo", "tiny"):
        small(c)
        (demo if name == "demo" else tiny)(c)
    elif arg:
        raise ValueError(f"base_64 has no variant {arg!r}; use 'width=N', 'demo' or 'tiny'")
    return c.lock()


def small(c: ConfigDict) -> None:
    """What the demo and the tests share: the embedded encoder's text, one device, Adam with a fast rate, fp32."""
    c.text.dim = 256
    c.data.update(image_size=16, text_length=32, batch_size=64, workers=0, cache_mib=64)
    c.mesh.fsdp = 1
    c.model.update(dtype="float32", remat="none", head_channels=32)
    c.optim.update(optimizer="adam", lr=1e-3, warmup=100, ema=0.9998)


def demo(c: ConfigDict) -> None:
    """16x16, a quarter of the paper's resolution: two levels after folding 2x2 patches, text attention at 4x4."""
    c.name = "base_16"
    c.data.batch_size = 32
    c.model.update(channels=64, multipliers=(1, 2), blocks=1, attention=(False, True), text_attention=(False, True), cond_dim=160, pool_heads=5, patch=2)
    # Both weigh high noise, where the caption decides, more than eps and cosine do: minutes suffice to learn a little text.
    c.diffusion.update(prediction="x", schedule="linear")
    # Dynamic thresholding divides by the brightest pixels, which greys a white background; static leaves it white.
    c.sampling.update(method="ddim", steps=16, w=2.0, threshold="static")
    c.train.update(steps=40_000, log_every=50, sample_every=2_000, sample_rows=16, save_every=1_000, keep=2)


def tiny(c: ConfigDict) -> None:
    """A few thousand parameters with every part in place."""
    c.name = "base_tiny"
    c.data.update(image_size=8, batch_size=8)
    c.model.update(channels=16, multipliers=(1, 2), blocks=1, attention=(False, True), text_attention=(False, True), head_channels=16, cond_dim=16, pool_heads=2)
    c.sampling.update(steps=4)
    c.train.update(steps=8, log_every=1, sample_every=0, save_every=4)
