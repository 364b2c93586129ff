r"""A small base model for 1M images of GPIC: U-Net of width 128, 142M parameters, 64x64.

    python -m imagen_jax.train --config configs/recipes/gpic_nano_base_64.py \
        --config.data.path=data/gpic_nano --workdir runs/nano_base
    python -m imagen_jax.train --config configs/recipes/gpic_nano_base_64.py:demo \
        --config.data.path=data/emoji --workdir runs/base --minutes 5

CPU: the second command is base_64.py:demo, on data/emoji of the README.

One GPU of 24 GB: add --config.optim.accumulation=4 to the first command. The result is the same up
to rounding, from four times smaller activations.

Data: docs/data-recipes.md, "GPIC-nano". Evaluation of the cascade with gpic_nano_sr_256.py: as of
GPIC on that page. For orientation: a model of 1.1B parameters, trained on 100M images, has an
FD-DINOv2 of 76.25 at w = 6.25 (arXiv 2605.30341). No result on 1M images is known to us.

It differs from base_64.py:width=128 in the text encoder (T5-large, 1,024 features), the batch of
256, a warm-up of 1,000 steps, a mesh without fsdp, and 40,000 steps: about 10 epochs.

Hardware: one v5e-8 host (v5e:2x4) or one GPU of 24 GB. Planned: 1.45 hours and 3.4 of 15.75 GiB per
chip on v5e:2x4; 10.2 of 21 GiB on one RTX 4090, where a step has 0.47 s of arithmetic at the card's
peak and 1.01 s of memory traffic. Hours on the GPU are not planned.
Expect: not trained yet, so no loss or score is known.
Recorded: BENCHMARKS.md, "Planned, not run: the recipes for GPIC".

Variants: `:demo` for two CPU cores and `:tiny` for tests, as in base_64.py.
"""

from ml_collections import ConfigDict

from configs import base_64
from configs.recipes import check_variant


def get_config(arg: str = "") -> ConfigDict:
    """The complete config: base_64 with the changes below; `arg` is "", "demo" or "tiny"."""
    check_variant(arg)
    c = base_64.get_config(arg or "width=128").unlock()
    c.name = f"gpic_nano_{c.name}" if arg else "gpic_nano_base_64"
    if not arg:
        c.text.dim = 1024  # T5-large v1.1
        c.data.batch_size = 256
        c.optim.warmup = 1_000
        c.mesh.fsdp = 1
        c.train.steps = 40_000
    return c.lock()
