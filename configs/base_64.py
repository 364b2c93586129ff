r"""The 64x64 base model: U-Net of width 512, 2.26B parameters with text (F.1).

    python -m imagen_jax.train --config configs/base_64.py --config.data.path=PREPARED \
        --workdir WORKDIR

Hardware: 256 TPU v4 chips in the paper, 2.5M steps of 2048 images. This repository plans 179 h on
v4:4x8x8, 228 h on v5e:16x16 (256 chips each) and 165 h on v5p:4x4x8 (128 chips).
Expect: not trained yet, so no loss is known. Planned MFU: 50 % on v4, 55 % on v5e, 65 % on v5p.
Recorded: BENCHMARKS.md, "Planned, not run"; drawing with guidance on one H100, "One H100".

Variants:

    :width=N  the sizes of the ablations: 192 (300M), 256 (500M), 384 (1B), with cond_dim 512 up to
              500M. Not trained yet and not planned.
    :demo     the demo's base at 16x16 on two CPU cores or one GPU, batches of 32. The embedded
              base_16 is this config after 7,750 steps: held-out loss 0.022, and 89 % of held-out
              captions have their image among the 5 nearest. 4.8 minutes give 1,398 steps and 65 %.
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
    c.text = dict(dim=4096)  # T5-XXL v1.1; must be the width of the prepared embeddings
    c.data = defaults.data() | dict(image_size=64, lowres_size=0, crop_size=0)
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
    c.diffusion = defaults.diffusion()
    # Not in the paper: steps. w=1.35 has the best FID on COCO (Table 1).
    c.sampling = defaults.sampling() | dict(steps=256)
    c.optim = defaults.optim() | dict(optimizer="adafactor")
    c.mesh = defaults.mesh()
    c.train = defaults.train()
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
    """16x16, a quarter of the paper's resolution.

    2x2 patches are folded into channels, then come two levels; text attention is at 4x4.
    """
    c.name = "base_16"
    c.data.update(image_size=16, batch_size=32, cache_mib=64)
    two_levels(c)
    c.model.update(channels=64, head_channels=32, cond_dim=160, pool_heads=5, patch=2)
    # Both give high noise, where the caption decides, more weight than eps and cosine do, so a few
    # minutes of training already follow the text a little.
    c.diffusion.update(prediction="x", schedule="linear")
    # Dynamic thresholding divides by the brightest pixels and turns a white background grey; static
    # thresholding keeps it white.
    c.sampling.update(method="ddim", steps=16, w=2.0, threshold="static")
    c.train.update(
        steps=40_000, log_every=50, sample_every=2_000, sample_rows=16, save_every=1_000, keep=2
    )


def tiny(c: ConfigDict) -> None:
    """A few thousand parameters with every part in place."""
    defaults.tiny(c)
    c.name = "base_tiny"
    c.data.update(image_size=8, cache_mib=64)
    two_levels(c)
    c.model.update(channels=16, head_channels=16, cond_dim=16, pool_heads=2)


def two_levels(c: ConfigDict) -> None:
    """Two levels of one block, the second with attention to pixels and text."""
    c.model.update(multipliers=(1, 2), blocks=1)
    c.model.update(attention=(False, True), text_attention=(False, True))
