"""Default values of every section except `model`. Configs state only what differs.

The section `model` has no defaults. A new option gets its field in imagen_jax/schema.py
and its value here.
"""

from typing import Any

from ml_collections import ConfigDict

# Fields that were added after the first runs, with the value to assume for older saved configs (a
# test compares them with imagen_jax/schema.py). configs/saved.py adds them to such configs.
ADDED: dict[str, dict[str, Any]] = {
    "text": dict(
        encoders=(), dims=(), lengths=(), pooled_dims=(), drops=(), online=False, online_encoder=""
    ),
    "data": dict(
        shard_cache_dir="",
        shard_cache_gib=64.0,
        decode="exact",
        mixture=(),
        view="centre",
        view_scale=(0.8, 1.0),
        buckets=(),
    ),
    "diffusion": dict(
        process="vp",
        density="uniform",
        density_mean=0.0,
        density_std=1.0,
        weight="none",
    ),
    "sampling": dict(
        grid="t",
        grid_logsnr=(-8.764, 12.429),  # sigma / alpha from 80 to 0.002 (Karras et al. 2022)
        grid_rho=7.0,
        w_interval=(-20.0, 20.0),  # the full range of log-SNR
    ),
    "optim": dict(ema_tracks=()),
    "train": dict(
        validate_every=0,
        validate_rows=256,
        wandb="",
        fast_every=0,
        fast_dir="/dev/shm/imagen_jax",  # memory of the host
        keep_every=0,
        keep_best=0,
        best_by="ema/x_error",
        on_bad_step="stop",
        max_skips=10,
        spike_factor=0.0,
        on_spike="log",
    ),
}


def text(dim: int) -> dict[str, Any]:
    """Settings of the text features: of one unnamed encoder of width `dim`."""
    return dict(dim=dim, **ADDED["text"])


def data() -> dict[str, Any]:
    """Settings of the images and captions; each config sets its sizes."""
    return dict(
        path="",  # a directory made by imagen_jax.prepare_data
        text_length=128,  # not in the paper; as in NVIDIA NeMo
        batch_size=2048,
        caption="random",
        flip=False,
        workers=8,
        cache_mib=0,
        **ADDED["data"],
    )


def buckets(size: int, step: int, limit: float = 3.0) -> tuple[tuple[int, int], ...]:
    """Sizes (height, width) for data.buckets: about size^2 pixels, sides in multiples of `step`.

    There is one pair of sizes, upright and wide, for each short side; its long side is the multiple
    of `step` next to size^2 / short side. Ratios of the sides are at most `limit`. Twice the size
    and twice the step give sizes twice as large, so those of a super-resolution stage fit its base.

    step: a multiple of the factor by which the network shrinks images. Raises ValueError if `size`
    is not a multiple of `step`.
    """
    if size % step:
        raise ValueError(f"buckets around {size} pixels need steps that divide it, not {step}")
    wide = []
    for short in range(step, size, step):
        long = step * round(size * size / (short * step))
        if long <= limit * short:
            wide.append((short, long))
    upright = [(long, short) for short, long in reversed(wide)]
    return (*wide, (size, size), *upright)


def diffusion() -> dict[str, Any]:
    """Diffusion settings of a base model."""
    return dict(
        schedule="cosine",
        aug_schedule="cosine",
        aug_max=0.0,
        prediction="eps",
        text_drop=0.1,
        **ADDED["diffusion"],
    )


def sampling() -> dict[str, Any]:
    """Sampling settings; each config sets its number of steps."""
    return dict(
        method="ancestral",
        gamma=0.2,  # not in the paper
        w=5.0,  # the value in Fig. A.10; Table 1 has its best FID at 1.35
        threshold="dynamic",
        percentile=99.5,
        aug_level=0.0,
        **ADDED["sampling"],
    )


def optim() -> dict[str, Any]:
    """Optimization settings; each config sets its optimizer."""
    return dict(
        lr=1e-4,
        warmup=10_000,
        # F.1-F.3 list a cosine decay, but its listed end value cannot be a learning rate.
        decay="constant",
        beta1=0.9,  # Adam's, unused by Adafactor
        beta2=0.999,
        eps=1e-8,
        weight_decay=0.0,
        clip=1.0,  # not in the paper; as in Google's diffusion_distillation
        ema=0.9999,  # not in the paper; as in Google's diffusion_distillation
        accumulation=1,
        **ADDED["optim"],
    )


def mesh() -> dict[str, Any]:
    """Sharding settings."""
    return dict(
        data=-1,
        fsdp=16,
        model=1,
        spatial=1,
        fsdp_min_elements=65_536,
        rules=((".*", "fsdp"),),
    )


def train() -> dict[str, Any]:
    """The length of a run and its output."""
    return dict(
        steps=2_500_000,
        log_every=100,
        sample_every=5_000,
        sample_rows=16,
        save_every=5_000,
        keep=3,
        **ADDED["train"],
    )


def small(c: ConfigDict) -> None:
    """Changes for the demo and the tests: embedded text encoder, one device, high learning rate."""
    c.text.dim = 256
    c.data.update(text_length=32, workers=0)
    c.mesh.fsdp = 1
    c.model.update(dtype="float32", remat="none")
    c.optim.update(optimizer="adam", lr=1e-3, warmup=100, ema=0.9998)
    c.train.validate_every = 0


def tiny(c: ConfigDict) -> None:
    """Changes for tests only: a few steps of a few images."""
    c.data.batch_size = 8
    c.sampling.steps = 4
    c.train.update(steps=8, log_every=1, sample_every=0, save_every=4)
