r"""A small 64->256 model for 1M images of GPIC: half the paper's widths, 120M parameters.

    python -m imagen_jax.train --config configs/recipes/gpic_nano_sr_256.py \
        --config.data.path=data/gpic_nano --workdir runs/nano_sr
    python -m imagen_jax.train --config configs/recipes/gpic_nano_sr_256.py:demo \
        --config.data.path=data/emoji --workdir runs/sr_64 --minutes 5

CPU: the second command is sr_256.py:demo, on data/emoji of the README.

One GPU of 24 GB: add --config.optim.accumulation=4 to the first command.

Data: docs/data-recipes.md, "GPIC-nano". With gpic_nano_base_64.py it is a cascade for 256x256, the
size of GPIC's baseline. That has an FD-DINOv2 of 76.25 at w = 6.25 after 100M images with 1.1B
parameters (arXiv 2605.30341). No result on 1M images is known to us.

It differs from sr_256.py in the widths, the text encoder (T5-large, 1,024 features), the batch of
128, a warm-up of 1,000 steps, a mesh without fsdp, and 60,000 steps: about 8 epochs.

Hardware: one v5e-8 host (v5e:2x4) or one GPU of 24 GB. Planned: 1.63 hours and 4.0 of 15.75 GiB per
chip on v5e:2x4; 6.4 of 21 GiB on one RTX 4090, where a step has 0.28 s of arithmetic at the card's
peak and 0.31 s of memory traffic. Hours on the GPU are not planned.
Expect: not trained yet, so no loss or score is known.
Recorded: BENCHMARKS.md, "Planned, not run: the recipes for GPIC".

Variants: `:demo` for two CPU cores and `:tiny` for tests, as in sr_256.py.
"""

from ml_collections import ConfigDict

from configs import sr_256
from configs.recipes import check_variant


def get_config(arg: str = "") -> ConfigDict:
    """The complete config: sr_256 with the changes below; `arg` is "", "demo" or "tiny"."""
    check_variant(arg)
    c = sr_256.get_config(arg).unlock()
    c.name = f"gpic_nano_{c.name}"
    if not arg:
        c.text.dim = 1024  # T5-large v1.1
        c.data.batch_size = 128
        c.model.widths = (64, 128, 256, 512)
        c.optim.warmup = 1_000
        c.mesh.fsdp = 1
        c.train.steps = 60_000
    return c.lock()
