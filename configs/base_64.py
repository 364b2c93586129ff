r"""The 64x64 base model: U-Net of width 512, 2.26B parameters with text (F.1).

    python -m imagen_jax.train --config configs/base_64.py --config.data.path=PREPARED \
        --workdir WORKDIR
    python -m imagen_jax.train --config configs/base_64.py:demo --config.data.path=data/emoji \
        --workdir runs/base --minutes 5

CPU: the second command trains `:demo` on two cores, on data/emoji of the README, for 5 minutes and
saves. Expect about 1,400 steps; run the same command again to continue.

Hardware: 256 TPU v4 chips in the paper, 2.5M steps of 2048 images. imagen_jax.plan estimates
179 h on v4:4x8x8, 228 h on v5e:16x16 (256 chips each) and 165 h on v5p:4x4x8 (128 chips).
Expect: unknown; this config was never trained. Planned MFU: 50 % on v4, 55 % on v5e, 65 % on v5p.
Recorded: BENCHMARKS.md, "Planned, not run"; guided sampling on one H100: "One H100".

Variants:

    :width=192, :width=256, :width=384
              smaller models for ablations: 300M, 500M, 1B. Any other width is possible, too.
              cond_dim is 512 up to width 256. Neither trained nor planned yet.
    :demo     the demo's base at 16x16 on two CPU cores or one GPU, batches of 32. The embedded
              base_16 is this config after 7,750 steps: held-out loss 0.022, retrieval@5 of
              held-out captions 89.0 % [85.1, 91.9], n = 326. 4.8 minutes of training are 1,398
              steps and give 64.6 % [54.6, 73.4], n = 96.
              Recorded: BENCHMARKS.md, "The embedded cascade" and "`make demo` from a fresh clone".
    :tiny     for tests: 8 steps, seconds on a CPU.
"""

from ml_collections import ConfigDict

from configs import defaults


def get_config(arg: str = "") -> ConfigDict:
    """The complete config; `arg` is "", "width=N", "demo" or "tiny"."""
    c = ConfigDict()
    c.name = "base_64"
    c.seed = 0
    c.text = defaults.text(4096)  # T5-XXL v1.1; must equal the feature width of the prepared data
    c.data = defaults.data() | dict(image_size=64, lowres_size=0, crop_size=0)
    c.model = dict(
        family="unet",
        channels=512,
        multipliers=(1, 2, 3, 4),
        blocks=3,
        attention=(False, True, True, True),  # at resolutions 32, 16 and 8
        text_attention=(False, True, True, True),
        head_channels=64,
        cond_dim=2048,  # not in the paper; 512 to 4096 agree with its parameter counts
        pooling="attention",
        pool_heads=32,
        res_block="biggan",
        scale_shift=True,
        patch=1,
        dropout=0.0,
        dtype="bfloat16",
        remat="matrix",
    )
    c.diffusion = defaults.diffusion()
    # The number of steps is not in the paper. w stays at 5.0 (Fig. A.10); the best FID on COCO
    # (Table 1) needs w = 1.35.
    c.sampling = defaults.sampling() | dict(steps=256)
    c.optim = defaults.optim() | dict(optimizer="adafactor")
    c.mesh = defaults.mesh()
    # 256 rows take the time of about 5 training steps.
    c.train = defaults.train() | dict(validate_every=5_000)
    name, _, value = arg.partition("=")
    if name == "width":
        width = int(value)
        cond_dim = 512 if width <= 256 else 2048
        c.name = f"base_64_w{width}"
        c.model.update(channels=width, cond_dim=cond_dim, pool_heads=cond_dim // 64)
    elif name in ("demo", "tiny"):
        defaults.small(c)
        (demo if name == "demo" else tiny)(c)
    elif arg:
        raise ValueError(f"base_64 has no variant {arg!r}; use 'width=N', 'demo' or 'tiny'")
    return c.lock()


def demo(c: ConfigDict) -> None:
    """16x16 images, a quarter of the paper's resolution.

    2x2 patches give 8x8 inputs for two levels; text attention is at 4x4.
    """
    c.name = "base_16"
    c.data.update(image_size=16, batch_size=32, cache_mib=64)
    two_levels(c)
    c.model.update(channels=64, head_channels=32, cond_dim=160, pool_heads=5, patch=2)
    # Compared with eps and cosine, both weight high noise levels more, where the caption matters
    # most. So a few minutes of training already give some text alignment.
    c.diffusion.update(prediction="x", schedule="linear")
    # Dynamic thresholding divides by a percentile of |x-hat|, which turns a white background grey.
    # Static thresholding keeps it white.
    c.sampling.update(method="ddim", steps=16, w=2.0, threshold="static")
    c.train.update(
        steps=40_000, log_every=50, sample_every=2_000, sample_rows=16, save_every=1_000, keep=2
    )


def tiny(c: ConfigDict) -> None:
    """A very small model with all components."""
    defaults.tiny(c)
    c.name = "base_tiny"
    c.data.update(image_size=8, cache_mib=64)
    two_levels(c)
    c.model.update(channels=16, head_channels=16, cond_dim=16, pool_heads=2)


def two_levels(c: ConfigDict) -> None:
    """Two levels of one block; the second has self-attention and cross-attention to the text."""
    c.model.update(multipliers=(1, 2), blocks=1)
    c.model.update(attention=(False, True), text_attention=(False, True))
